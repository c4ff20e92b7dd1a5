"""LE-UDA's bundle: translator first, then translations, then the student; labels of any values; resumed bit-exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_copies import BUNDLES, LE_UDA, write_domains
from monai.bundle import ConfigParser

from medkd.data.translate_slices import translate_slices
from medkd.deploy.bundle import load_bundle
from medkd.deploy.predict import predict_volume
from medkd.errors import InputError
from medkd.workflows.train import merged_config, train, training_file

TINY = {
    "source_domain": "MR_T1",
    "target_domain": "CT",
    "widths": [2, 4, 8],
    "generator_width": 2,
    "generator_blocks": 1,
    "critic_width": 2,
    "batch_size": 2,
    "spacing_mm": [2.0, 2.0, -1],
    "patch_size": [32, 32],
    "epoch_length": 2,
    "translator_epochs": 1,
    "val_interval": 1,
    "train#trainer#max_epochs": 2,
}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """Two domains whose only structure has the label 205, as the published label maps of MM-WHS do."""
    root = write_domains(tmp_path_factory.mktemp("domains"))
    for file in (root / "labels").iterdir():
        volume = nib.load(file)
        nib.save(nib.Nifti1Image(np.asarray(volume.dataobj).astype(np.int16) * 205, volume.affine), file)
    datalist = json.loads((root / "datalist.json").read_text())
    datalist["labels"] = {"0": "background", "205": "myocardium"}
    (root / "datalist.json").write_text(json.dumps(datalist))
    return root


@pytest.fixture(scope="module")
def run(cohort, tmp_path_factory) -> Path:
    return train(BUNDLES / LE_UDA, settings(cohort), run_dir=tmp_path_factory.mktemp("runs") / "le_uda", device="cpu")


def settings(cohort: Path, **further) -> dict[str, object]:
    return {**TINY, "dataset_dir": str(cohort), **further}


def shipped(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "bundle" / "models" / "model.pt", weights_only=True)


def test_predictions_carry_the_label_values_of_the_data(run, cohort):
    bundle = load_bundle(run / "bundle")
    assert bundle.labels == {0: "background", 205: "myocardium"}
    labels = predict_volume(bundle, cohort / "images" / "test_0.nii.gz")
    assert labels.shape == (40, 48, 4)
    assert set(np.unique(labels)) <= {0, 205}


def test_an_interrupted_run_ends_in_the_same_weights(run, cohort, tmp_path):
    cut = Path(shutil.copytree(run, tmp_path / "cut", symlinks=True))
    newest = sorted(cut.glob("checkpoints/step-*.pt"))[-1]
    newest.unlink()
    shutil.rmtree(cut / "bundle")
    train(BUNDLES / LE_UDA, settings(cohort), run_dir=cut, resume=True, device="cpu")
    before, after = shipped(run), shipped(cut)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_volumes_are_translated_by_the_trained_generators(cohort, tmp_path):
    config = merged_config([training_file(BUNDLES / LE_UDA)])
    parser = ConfigParser(config)
    for name, value in settings(cohort, bundle_root=str(BUNDLES / LE_UDA), run_dir=str(tmp_path)).items():
        parser[name] = value
    parser["output_weights"] = str(tmp_path / "model.pt")
    parser["device"] = "$torch.device('cpu')"
    parser.get_parsed_content("run")
    ema = parser.get_parsed_content("i2i#method").ema
    method = parser.get_parsed_content("train#method")
    assert method.generator is ema["to_source"]
    item = parser.get_parsed_content("train#target_dataset")._cache[0]
    source_style = translate_slices(item["image"], ema["to_source"])
    torch.testing.assert_close(item["translated"].as_tensor(), source_style)
    torch.testing.assert_close(item["cycled"].as_tensor(), translate_slices(source_style, ema["to_target"]))
    assert "label" not in item


def test_mt_uda_trains_from_the_same_bundle(cohort, tmp_path):
    chosen = {"train#method": "@mt_uda", "train#optimizers": "@mt_uda_optimizers", "train#trainer#max_epochs": 1}
    made = train(BUNDLES / LE_UDA, settings(cohort, **chosen), run_dir=tmp_path / "run", device="cpu")
    assert {name.split(".")[0] for name in shipped(made)} == {"generator", "segmenter"}


def test_a_patient_tested_in_both_domains_is_one_clear_line(cohort, tmp_path):
    datalist = json.loads((cohort / "datalist.json").read_text())
    for case in datalist["test"]:
        case["patient"] = "the same"
    listed = cohort / "leaking.json"
    listed.write_text(json.dumps(datalist))
    with pytest.raises(InputError, match="the same") as refused:
        train(BUNDLES / LE_UDA, settings(cohort, datalist=str(listed)), run_dir=tmp_path / "run", device="cpu")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


SOURCE_FREE = {"train::streams": "@target_only"}
ADVERSARIAL = {"train::optimizers": "@critics_too"}
BASELINES = {
    "dacs": {},
    "adv_ent": {**ADVERSARIAL, "adv_ent::critics::layers": 3},
    "shot": SOURCE_FREE,
    "random_convolution": {"train::streams": "@source_only"},
}


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_baseline_trains_from_the_overlay_and_ships_the_student_alone(baseline, cohort, tmp_path):
    chosen = {key: value for key, value in settings(cohort, source_epochs=1).items() if key != "translator_epochs"}
    overrides = {**chosen, "train::method": f"@{baseline}", **BASELINES[baseline]}
    folder = train(BUNDLES / LE_UDA, overrides, overlays=["baselines"], run_dir=tmp_path / "run", device="cpu")
    assert (folder / "source" / "checkpoints" / "last.pt").exists()
    bundle = load_bundle(folder / "bundle")
    assert type(bundle.network).__name__ == "BilinearUNet"
    assert set(np.unique(predict_volume(bundle, cohort / "images" / "test_0.nii.gz"))) <= {0, 205}


def test_every_baseline_of_the_overlay_can_be_built():
    config = merged_config([training_file(BUNDLES / LE_UDA), BUNDLES / LE_UDA / "configs" / "baselines.json"])
    built = {name: part for name, part in config.items() if str(part).startswith("{'_target_': 'medkd.methods.")}
    assert len(built) == 12  # with LE-UDA and MT-UDA
    config.update(labels={"0": "background", "1": "heart"}, widths=[4, 8, 8, 8])
    parser = ConfigParser({key: config[key] for key in (*built, "widths", "labels", "critic_width", "network_def")})
    for name in set(built) - {"le_uda", "mt_uda"}:
        assert parser.get_parsed_content(name).roles[0] == "student"
