from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_factory import TRAIN_CONFIG, make_bundle, write_image
from monai.bundle import ConfigWorkflow

from medkd.data.volumes import read_volume
from medkd.deploy.bundle import load_bundle
from medkd.deploy.predict import predict_ensemble, predict_probabilities, predict_volume
from medkd.errors import ConfigError


@pytest.fixture(scope="module")
def loaded(shared_bundle):
    return load_bundle(shared_bundle)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    return [write_image(folder / f"case{seed}.nii.gz", seed=seed) for seed in range(2)]


@pytest.mark.filterwarnings("ignore:NvImgCodec")
def test_prediction_is_what_the_monai_evaluator_writes(shared_bundle, loaded, images, tmp_path):
    bundle = Path(shutil.copytree(shared_bundle, tmp_path / "b_segmentation"))
    workflow = ConfigWorkflow(
        workflow_type="infer",
        config_file=str(bundle / "configs" / "inference.json"),
        meta_file=str(bundle / "configs" / "metadata.json"),
        logging_file=False,
        bundle_root=str(bundle),
        dataset_dir=str(images[0].parent),
    )
    workflow.initialize()
    assert workflow.check_properties() == []
    workflow.run()
    workflow.finalize()
    for image in images:
        written = nib.load(bundle / "eval" / image.name.replace(".nii.gz", "_seg.nii.gz"))
        predicted = predict_volume(loaded, image)
        assert len(np.unique(predicted)) > 1
        np.testing.assert_array_equal(np.asarray(written.dataobj), predicted)
        np.testing.assert_allclose(written.affine, read_volume(image).affine, atol=1e-5)


def test_probabilities_sum_to_one_and_their_argmax_is_the_prediction(loaded, images):
    probabilities = predict_probabilities(loaded, images[0])
    np.testing.assert_allclose(probabilities.sum(0), 1, atol=1e-5)
    np.testing.assert_array_equal(probabilities.argmax(0), predict_volume(loaded, images[0]))


def test_ensemble_is_the_argmax_of_mean_probabilities(loaded, images, tmp_path):
    other = load_bundle(make_bundle(tmp_path / "other_segmentation", seed=1))
    mean = (predict_probabilities(loaded, images[0]) + predict_probabilities(other, images[0])) / 2
    np.testing.assert_array_equal(predict_ensemble([loaded, other], images[0]), mean.argmax(0))
    np.testing.assert_array_equal(predict_ensemble([loaded], images[0]), predict_volume(loaded, images[0]))


def test_prediction_follows_the_image_when_its_axes_are_stored_otherwise(loaded, tmp_path):
    plain = write_image(tmp_path / "ras.nii.gz", affine=np.diag([1.5, 1.5, 2.0, 1.0]))
    turned = nib.load(plain).as_reoriented(nib.orientations.axcodes2ornt(("P", "I", "L")))
    nib.save(turned, tmp_path / "pil.nii.gz")
    expected = nib.Nifti1Image(predict_volume(loaded, plain), nib.load(plain).affine)
    expected = expected.as_reoriented(nib.orientations.axcodes2ornt(("P", "I", "L")))
    np.testing.assert_array_equal(predict_volume(loaded, tmp_path / "pil.nii.gz"), np.asarray(expected.dataobj))


def test_two_dimensional_network_runs_slice_by_slice(tmp_path):
    config = json.loads(json.dumps(TRAIN_CONFIG))
    config["network_def"] |= {"spatial_dims": 2}
    config["inferer"] = {"_target_": "monai.inferers.SliceInferer", "roi_size": [16, 16], "spatial_dim": 2}
    bundle = load_bundle(make_bundle(tmp_path / "slices_segmentation", train_config=config))
    image = write_image(tmp_path / "image.nii.gz")
    assert predict_volume(bundle, image).shape == read_volume(image).array.shape


def test_bundle_that_does_not_come_back_to_the_input_grid_is_named(shared_bundle, images, tmp_path):
    bundle = Path(shutil.copytree(shared_bundle, tmp_path / "b_segmentation"))
    file = bundle / "configs" / "inference.json"
    content = json.loads(file.read_text())
    del content["postprocessing"]["transforms"][1]
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="add Invertd"):
        predict_volume(load_bundle(bundle), images[0])


def test_network_is_left_in_eval_mode_without_gradients(loaded, images):
    predict_volume(loaded, images[0])
    assert not loaded.network.training
    assert not any(parameter.requires_grad for parameter in loaded.network.parameters())
    assert torch.is_grad_enabled()
