"""MONAI's own commands on copies of the shipped bundles, in this process."""

from __future__ import annotations

import csv

import nibabel as nib
import numpy as np
import onnxruntime
import pytest
import torch
from bundle_copies import CLASSIFIER, CMEDL, LE_UDA, METRIC, NAMES, OVERLAY, SHIPPED, TRANSLATOR, WINDOW, Copy
from monai.bundle import ConfigWorkflow, ckpt_export, onnx_export, verify_metadata, verify_net_in_out
from PIL import Image

from medkd.data import demo_slide
from medkd.deploy.bundle import load_bundle
from medkd.deploy.predict import predict_volume, translate_volume
from medkd.deploy.slide_bundle import slide_task
from medkd.engine.checkpoint import load_newest
from medkd.workflows.bundles import check_bundle
from medkd.wsi import Slide, TileGrid, predict_slide

pytestmark = pytest.mark.filterwarnings("ignore")


LARGE = ("act_net_cardiac_segmentation", CMEDL, LE_UDA)  # their ONNX export takes long


@pytest.mark.parametrize(
    ("workflow", "configs"),
    [("train", ("train",)), ("train", ("train", "overlay")), ("infer", ("inference",))],
)
def test_workflow_has_the_properties_monai_asks_for(copy: Copy, workflow, configs):
    configs = tuple(OVERLAY[copy.name] if config == "overlay" else config for config in configs)
    built = ConfigWorkflow(
        config_file=copy.configs(*configs), workflow_type=workflow, logging_file=False, **copy.overrides(*configs)
    )
    built.initialize()
    assert built.check_properties() == []
    assert str(built.bundle_root) == str(copy.root)


def test_verify_metadata_takes_the_schema_in_the_bundle(copy: Copy, monkeypatch):
    monkeypatch.setattr("monai.apps.utils._download_with_progress", None)
    verify_metadata(
        meta_file=str(copy.root / "configs" / "metadata.json"), filepath=str(copy.root / "eval" / "schema.json")
    )


@pytest.mark.parametrize("n", [1, 6])
def test_verify_net_in_out(copy: Copy, n):
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(copy.root / "configs" / "metadata.json"),
        config_file=copy.configs("inference"),
        device="cpu",
        n=n,
    )


def test_training_writes_the_weights_of_the_network_that_ships(trained: Copy):
    weights = torch.load(trained.root / "models" / "model.pt", weights_only=True)
    path, state = load_newest(trained.root / "run" / "checkpoints")
    assert path.name.startswith("step-00000002-")
    found = 0
    for part, place in SHIPPED[trained.name].items():
        for name in (name for name in weights if name.startswith(part)):
            assert torch.equal(state["method"][place + name.removeprefix(part)], weights[name]), name
            found += 1
    assert found == len(weights) > 0
    with (trained.root / "run" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert METRIC[trained.name] in {row["name"] for row in rows if row["split"] == "validation"}


def test_the_teacher_is_the_one_that_was_trained_before(trained: Copy):
    folder = trained.root / "run" / "teacher" / "checkpoints"
    if not folder.is_dir():
        pytest.skip("trains no teacher first")
    teacher = load_newest(folder)[1]["method"]
    weights = load_newest(trained.root / "run" / "checkpoints")[1]["method"]
    frozen = {name: tensor for name, tensor in weights.items() if name.startswith("teacher.")}
    assert all(torch.equal(teacher[name.replace("teacher.", "student.", 1)], tensor) for name, tensor in frozen.items())


def test_training_again_is_refused_and_resuming_a_finished_run_keeps_its_weights(trained: Copy):
    before = (trained.root / "models" / "model.pt").read_bytes()
    with pytest.raises(RuntimeError) as caught:
        trained.run("train")
    assert "checkpoints of an earlier run" in str(caught.value.__cause__)
    trained.run("train", resume=True)
    assert (trained.root / "models" / "model.pt").read_bytes() == before


def test_overlay_trains_another_method_without_a_teacher(copy: Copy):
    copy.run("train", OVERLAY[copy.name])
    assert (copy.root / "models" / "model.pt").is_file()
    assert not (copy.root / "run" / "teacher").exists()


def test_evaluate_overlay_scores_the_test_cases(trained: Copy):
    trained.run("train", "evaluate")
    if trained.name == CLASSIFIER:
        text = (trained.root / "eval" / "metrics.csv").read_text()
        assert 0 <= float(text.split("val_auc")[1].split()[0].strip(",\t")) <= 1
        return
    if trained.name == TRANSLATOR:
        text = (trained.root / "eval" / "metrics.csv").read_text()
        assert float(text.split("negative_kid")[1].split()[0].strip(",\t")) < 0
        return
    with (trained.root / "eval" / "val_mean_dice_raw.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["filename"] == "test_0"
    assert 0 <= float(row["mean"]) <= 1


def probabilities(trained: Copy, image) -> np.ndarray:
    """Those of a tile, from the network medkd loads, by hand."""
    bundle = load_bundle(trained.root)
    slide = bundle.metadata["slide"]
    pixels = torch.from_numpy(np.asarray(Image.open(image), np.float32) / 255)
    normalized = ((pixels - torch.tensor(slide["mean"])) / torch.tensor(slide["std"])).permute(2, 0, 1)
    with torch.inference_mode():
        return torch.softmax(bundle.network(normalized[None]), 1)[0].numpy()


def test_inference_writes_the_class_probabilities_of_files(trained: Copy, tmp_path):
    if trained.name != CLASSIFIER:
        return
    trained.run("inference", output_dir=str(tmp_path))
    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = {row[0]: [float(value) for value in row[1:]] for row in csv.reader(file)}
    assert set(rows) == {str(path) for path in (trained.cohort / "images").iterdir()}
    expected = probabilities(trained, trained.test_image)
    np.testing.assert_allclose(rows[str(trained.test_image)], expected, atol=1e-4)


def test_slide_overlay_predicts_the_tiles_medkd_predicts(trained: Copy, tmp_path):
    if trained.name != CLASSIFIER:
        return
    slide_file = demo_slide(tmp_path / "demo.tiff", tiles=4)
    bundle = load_bundle(trained.root)
    task = slide_task(bundle)
    trained.run("inference", "slide", output_dir=str(tmp_path), slide_file=str(slide_file))
    with (tmp_path / "predictions.csv").open(newline="") as file:
        found = {row[0]: [float(value) for value in row[1:]] for row in csv.reader(file)}
    with Slide(slide_file) as slide:
        grid = TileGrid.build(slide, size=task.size, mpp=task.mpp, overlap=task.overlap)
        prediction = predict_slide(
            bundle.network, slide, grid, classes=task.classes, task=task.task, mean=task.mean, std=task.std, amp=False
        )
    assert list(found) == [f"demo_x{x}_y{y}" for x, y in grid.coords]
    np.testing.assert_allclose(list(found.values()), prediction.probabilities, atol=1e-3)


def test_inference_writes_the_translation_medkd_predicts(trained: Copy, tmp_path):
    if trained.name != TRANSLATOR:
        return
    trained.run("inference", datalist=[str(trained.test_image)], output_dir=str(tmp_path))
    (written,) = tmp_path.rglob("*.nii.gz")
    assert written.name == "test_1_translated.nii.gz"
    image, translated = nib.load(trained.test_image), nib.load(written)
    np.testing.assert_allclose(translated.affine, image.affine, atol=1e-4)
    found = np.asarray(translated.dataobj)
    assert found.dtype == np.float32
    assert found.shape == image.shape
    assert -160 <= found.min() < found.max() <= 240
    np.testing.assert_allclose(found, translate_volume(load_bundle(trained.root), trained.test_image), atol=0.1)


def test_inference_writes_the_segmentation_medkd_predicts(trained: Copy, tmp_path):
    if trained.name in (CLASSIFIER, TRANSLATOR):
        return
    trained.run("inference", datalist=[str(trained.test_image)], output_dir=str(tmp_path))
    (written,) = tmp_path.rglob("*.nii.gz")
    assert written.name == "test_0_seg.nii.gz"
    image, segmentation = nib.load(trained.test_image), nib.load(written)
    np.testing.assert_allclose(segmentation.affine, image.affine, atol=1e-4)
    bundle = load_bundle(trained.root)
    found = np.asarray(segmentation.dataobj)
    assert found.dtype == np.uint8
    assert found.shape == image.shape
    assert np.mean(found == predict_volume(bundle, trained.test_image)) > 0.999


def test_ckpt_export_scripts_the_network(trained: Copy, tmp_path):
    ckpt_export(
        net_id="network_def",
        filepath=str(tmp_path / "model.ts"),
        ckpt_file=str(trained.root / "models" / "model.pt"),
        meta_file=str(trained.root / "configs" / "metadata.json"),
        config_file=trained.configs("inference"),
    )
    window = torch.rand(WINDOW[trained.name])
    scripted = torch.jit.load(str(tmp_path / "model.ts")).eval()
    torch.testing.assert_close(scripted(window), load_bundle(trained.root).network(window), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "trained",
    [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in NAMES],
    indirect=True,
)
def test_onnx_export(trained: Copy, tmp_path):
    onnx_export(
        net_id="network_def",
        filepath=str(tmp_path / "model.onnx"),
        ckpt_file=str(trained.root / "models" / "model.pt"),
        meta_file=str(trained.root / "configs" / "metadata.json"),
        config_file=trained.configs("inference"),
    )
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    window = torch.rand(*[size if isinstance(size, int) else 1 for size in given.shape])
    (found,) = session.run(None, {given.name: window.numpy()})
    expected = load_bundle(trained.root).network(window)
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-3)


def test_bundle_check_finds_nothing(trained: Copy):
    report = check_bundle(trained.root)
    assert report.findings == []
    assert [code for code in report.code if code.problem] == []
