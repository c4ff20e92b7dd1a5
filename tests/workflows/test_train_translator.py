"""From a translation bundle to a run folder, a resumed run, a translated volume and a report."""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bundles"))

from bundle_copies import QUICK, SMALL, TRANSLATOR, write_domains

from medkd.engine.checkpoint import load_newest
from medkd.errors import ConfigError, InputError
from medkd.workflows.bundles import check_bundle
from medkd.workflows.evaluate import evaluate
from medkd.workflows.predict import predict
from medkd.workflows.train import train

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL_RUN = {**QUICK[TRANSLATOR], **SMALL[TRANSLATOR], "cyclegan::pool_size": 2, "train::trainer::max_epochs": 2}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    return write_domains(tmp_path_factory.mktemp("domains"))


@pytest.fixture(scope="module")
def run(cohort, tmp_path_factory) -> Path:
    return train(
        TRANSLATOR,
        {**SMALL_RUN, "dataset_dir": str(cohort)},
        run_dir=tmp_path_factory.mktemp("run") / "run",
        device="cpu",
    )


def test_run_folder_holds_a_bundle_that_passes_every_check(run):
    assert check_bundle(run).findings == []
    assert "MR_T1 to CT (CycleGAN)" in (run / "bundle" / "docs" / "README.md").read_text()


def test_translated_volume_has_the_scans_geometry_and_hounsfield_units(run, cohort, tmp_path):
    scan = cohort / "images" / "test_1.nii.gz"
    done = predict(run, [scan], tmp_path / "out", device="cpu")
    assert [path.name for path in done.written] == ["test_1_translated.nii.gz"]
    before, after = nib.load(scan), nib.load(done.written[0])
    np.testing.assert_allclose(after.affine, before.affine, atol=1e-6)
    assert after.shape == before.shape
    assert after.get_data_dtype() == np.float32
    assert int(after.header["sform_code"]) == 1
    values = after.get_fdata()
    assert -160 <= values.min() < values.max() <= 240


def test_report_shows_source_translation_and_the_way_back(run):
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "MR_T1 to CT" in page
    assert "CT to MR_T1" in page
    assert "negative_kid" in page


def test_a_run_cut_short_and_resumed_equals_a_whole_one_bit_for_bit(run, cohort, tmp_path):
    given = {**SMALL_RUN, "dataset_dir": str(cohort)}
    cut = tmp_path / "cut"
    shutil.copytree(run, cut)
    newest = load_newest(cut / "checkpoints")[0]
    (cut / "checkpoints" / "last.pt").unlink()
    (cut / "checkpoints" / "best.pt").unlink(missing_ok=True)
    newest.unlink()  # the end of the first epoch is what is left
    train(TRANSLATOR, given, run_dir=cut, resume=True, device="cpu")
    whole, resumed = (load_newest(folder / "checkpoints")[1]["method"] for folder in (run, cut))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert len(whole["pools.target._extra_state"]) == 2


def test_unit_trains_by_two_overrides(cohort, tmp_path):
    given = {**SMALL_RUN, "dataset_dir": str(cohort), "network_def": "@autoencoder", "train::method": "@unit"}
    given.pop("cyclegan::pool_size")
    given["train::trainer::max_epochs"] = 1
    run = train(TRANSLATOR, given, run_dir=tmp_path / "unit", device="cpu")
    assert check_bundle(run).findings == []
    assert "(UNIT)" in (run / "bundle" / "docs" / "README.md").read_text()
    assert predict(run, [cohort / "images" / "test_1.nii.gz"], tmp_path / "out", device="cpu").failures == []


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"source_domain": "PET"}, InputError, "has no domain 'PET': its domains are ['CT', 'MR_T1']"),
        ({"generator_widht": 2}, ConfigError, "did you mean generator_width"),
    ],
)
def test_unknown_domains_and_keys_are_refused_before_anything_is_written(cohort, tmp_path, change, error, words):
    with pytest.raises(error) as caught:
        train(TRANSLATOR, {**SMALL_RUN, "dataset_dir": str(cohort), **change}, run_dir=tmp_path / "run", device="cpu")
    assert words in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_evaluation_and_dicom_seg_of_a_translator_are_refused_in_one_line(run, cohort, tmp_path):
    with pytest.raises(ConfigError, match="translates images and gives no labels"):
        evaluate([run], cohort / "datalist.json", tmp_path / "out", device="cpu")
    with pytest.raises(ConfigError, match="no DICOM-SEG"):
        predict(run, [cohort / "images" / "test_1.nii.gz"], tmp_path / "out", output_format="dicom-seg", device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_bad_scan_stops_no_other(run, cohort, tmp_path, caplog):
    (tmp_path / "broken.nii.gz").write_bytes(b"not an image")
    with caplog.at_level(logging.ERROR):
        done = predict(
            run, [tmp_path / "broken.nii.gz", cohort / "images" / "test_1.nii.gz"], tmp_path / "out", device="cpu"
        )
    assert len(done.written) == len(done.failures) == 1
