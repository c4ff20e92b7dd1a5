from __future__ import annotations

import csv
import gzip
import logging
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from bundle_factory import write_dicom_series, write_image

from medkd.data.volumes import read_volume
from medkd.deploy.bundle import load_bundle
from medkd.deploy.predict import predict_volume
from medkd.errors import ConfigError, InputError
from medkd.workflows.inputs import find_sources
from medkd.workflows.predict import predict


def rows(out: Path) -> list[dict[str, str]]:
    with open(out / "failures.csv", newline="") as file:
        return list(csv.DictReader(file))


def everything_below(folder: Path) -> bytes:
    """Names and contents of all files, unpacked."""
    text = b""
    for path in folder.rglob("*"):
        text += str(path.relative_to(folder)).encode()
        if path.is_file():
            content = path.read_bytes()
            text += gzip.decompress(content) if path.suffix == ".gz" else content
    return text


def test_files_and_folders_are_predicted_in_their_own_geometry(shared_bundle, tmp_path):
    first = write_image(tmp_path / "in" / "a.nii.gz", seed=0)
    write_image(tmp_path / "folder" / "deep" / "b.nii", seed=1, affine=np.diag([-1.0, 1.0, 3.0, 1.0]))
    result = predict(shared_bundle, [first, tmp_path / "folder"], tmp_path / "out", device="cpu")
    assert [path.name for path in result.written] == ["a_seg.nii.gz", "b_seg.nii.gz"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a_seg.nii.gz", "b_seg.nii.gz"]
    written = nib.load(tmp_path / "out" / "a_seg.nii.gz")
    np.testing.assert_allclose(written.affine, nib.load(first).affine, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(written.dataobj), predict_volume(load_bundle(shared_bundle), first))


def test_bad_cases_are_listed_and_the_others_finish(shared_bundle, tmp_path):
    folder = tmp_path / "in"
    for name in ("good1", "good2", "truncated", "nan"):
        write_image(folder / f"{name}.nii.gz")
    content = (folder / "truncated.nii.gz").read_bytes()
    (folder / "truncated.nii.gz").write_bytes(content[: len(content) // 2])
    image = nib.load(folder / "nan.nii.gz")
    array = image.get_fdata()
    array[1, 2, 3] = np.nan
    nib.save(nib.Nifti1Image(array, image.affine), folder / "nan.nii.gz")
    result = predict(shared_bundle, [folder], tmp_path / "out", device="cpu")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "failures.csv",
        "good1_seg.nii.gz",
        "good2_seg.nii.gz",
    ]
    assert [failure.case for failure in result.failures] == ["nan", "truncated"]
    assert [row["case"] for row in rows(tmp_path / "out")] == ["nan", "truncated"]
    assert rows(tmp_path / "out")[0]["file"] == str(folder / "nan.nii.gz")
    assert "NaN" in rows(tmp_path / "out")[0]["error"]
    assert "\n" not in rows(tmp_path / "out")[1]["error"]


def test_a_fault_in_one_case_does_not_stop_the_others(shared_bundle, tmp_path, monkeypatch):
    for name in ("a", "b"):
        write_image(tmp_path / "in" / f"{name}.nii.gz")
    genuine = predict_volume

    def faulty(bundle, volume):
        if volume.path.name == "a.nii.gz":
            raise ZeroDivisionError("division by zero")
        return genuine(bundle, volume)

    monkeypatch.setattr("medkd.workflows.predict.predict_volume", faulty)
    result = predict(shared_bundle, [tmp_path / "in"], tmp_path / "out", device="cpu")
    assert [path.name for path in result.written] == ["b_seg.nii.gz"]
    assert result.failures[0].error == "ZeroDivisionError: division by zero"


def test_every_frame_of_a_cine_is_predicted(shared_bundle, tmp_path):
    image = nib.load(write_image(tmp_path / "frame.nii.gz"))
    cine = np.stack([np.asarray(image.dataobj), 2 * np.asarray(image.dataobj)], axis=3)
    nib.save(nib.Nifti1Image(cine, image.affine), tmp_path / "cine.nii.gz")
    result = predict(shared_bundle, [tmp_path / "cine.nii.gz"], tmp_path / "out", device="cpu")
    assert [path.name for path in result.written] == ["cine_frame0_seg.nii.gz", "cine_frame1_seg.nii.gz"]
    assert nib.load(result.written[0]).shape == image.shape


def test_files_of_one_name_get_different_outputs(shared_bundle, tmp_path):
    for patient in ("p1", "p2"):
        write_image(tmp_path / "in" / patient / "t1.nii.gz")
    result = predict(shared_bundle, [tmp_path / "in"], tmp_path / "out", device="cpu")
    assert [path.name for path in result.written] == ["p1_t1_seg.nii.gz", "p2_t1_seg.nii.gz"]


def test_dicom_series_becomes_a_segmentation_on_its_grid(shared_bundle, tmp_path):
    series = write_dicom_series(tmp_path / "scans" / "scan1")
    result = predict(shared_bundle, [tmp_path / "scans"], tmp_path / "out", device="cpu")
    assert [path.name for path in result.written] == ["scan1_seg.nii.gz"]
    np.testing.assert_allclose(nib.load(result.written[0]).affine, read_volume(series).affine, atol=1e-5)


def test_several_series_in_one_folder_are_a_failure_that_lists_them(shared_bundle, tmp_path):
    folder = write_dicom_series(tmp_path / "mixed", seed=0)
    other = write_dicom_series(tmp_path / "other", seed=1)
    uid = pydicom.dcmread(next(other.iterdir())).SeriesInstanceUID
    for file in other.iterdir():
        shutil.copy(file, folder / f"second_{file.name}")
    result = predict(shared_bundle, [folder], tmp_path / "out", device="cpu")
    assert "--series" in result.failures[0].error
    assert uid in result.failures[0].error
    chosen = predict(shared_bundle, [folder], tmp_path / "chosen", device="cpu", series=uid)
    assert len(chosen.written) == 1


@pytest.mark.filterwarnings("ignore")
def test_dicom_seg_lies_on_its_series_and_names_no_patient(shared_bundle, tmp_path):
    pytest.importorskip("highdicom")
    series = write_dicom_series(tmp_path / "scan")
    result = predict(shared_bundle, [series], tmp_path / "out", device="cpu", output_format="dicom-seg")
    assert result.failures == []
    segmentation = pydicom.dcmread(result.written[0])
    labels = predict_volume(load_bundle(shared_bundle), series)
    sources = {pydicom.dcmread(file).SOPInstanceUID: pydicom.dcmread(file) for file in series.iterdir()}
    assert [segment.SegmentLabel for segment in segmentation.SegmentSequence] == ["left", "right"]
    frames = segmentation.pixel_array
    for frame, groups in zip(frames, segmentation.PerFrameFunctionalGroupsSequence, strict=True):
        segment = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        reference = groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        place = round((float(sources[reference].ImagePositionPatient[2]) - 30.0) / 2.5)
        np.testing.assert_array_equal(frame, segment == labels[:, :, place].T)
    content = result.written[0].read_bytes()
    for secret in (b"DOE", b"4711", b"19700101", b"20200102", b"General Hospital", b"DOCTOR"):
        assert secret not in content


def test_dicom_seg_of_a_nifti_file_is_a_failure(shared_bundle, tmp_path):
    pytest.importorskip("highdicom")
    image = write_image(tmp_path / "a.nii.gz")
    result = predict(shared_bundle, [image], tmp_path / "out", device="cpu", output_format="dicom-seg")
    assert "use --format nifti" in result.failures[0].error


def test_deidentified_outputs_hold_no_name_tag_or_id(shared_bundle, tmp_path, caplog):
    folder = tmp_path / "DOE^JANE 19700101"
    good = write_image(folder / "janedoe_t1.nii.gz")
    image = nib.load(good)
    image.header["descrip"] = b"DOE^JANE 19700101"
    nib.save(image, good)
    (folder / "janedoe_broken.nii.gz").write_bytes(good.read_bytes()[:500])
    write_dicom_series(folder / "janedoe_ct")
    mixed = write_dicom_series(folder / "janedoe_mixed", seed=2)
    uids = {pydicom.dcmread(next(mixed.iterdir())).SeriesInstanceUID}
    for file in write_dicom_series(tmp_path / "x", seed=3).iterdir():
        shutil.copy(file, mixed / f"janedoe_{file.name}")
        uids.add(pydicom.dcmread(file).SeriesInstanceUID)
    with caplog.at_level(logging.DEBUG):
        result = predict(shared_bundle, [folder], tmp_path / "out", device="cpu", deidentify=True)
    assert len(result.written) == 2
    assert len(result.failures) == 2
    assert {path.name for path in result.written} <= {f"case-000{number}_seg.nii.gz" for number in range(1, 5)}
    leaks = everything_below(tmp_path / "out") + "".join(r.getMessage() for r in caplog.records).encode()
    for secret in (b"DOE", b"JANE", b"janedoe", b"1970", b"4711", b"Hospital", *(uid.encode() for uid in uids)):
        assert secret not in leaks


def test_dicom_tags_never_reach_an_output(shared_bundle, tmp_path, caplog):
    series = write_dicom_series(tmp_path / "scan")
    broken = write_dicom_series(tmp_path / "broken", seed=1)
    sorted(broken.iterdir())[5].unlink()
    with caplog.at_level(logging.DEBUG):
        predict(shared_bundle, [series, broken], tmp_path / "out", device="cpu")
    leaks = everything_below(tmp_path / "out") + "".join(r.getMessage() for r in caplog.records).encode()
    for secret in (b"DOE", b"4711", b"19700101", b"Hospital"):
        assert secret not in leaks


@pytest.mark.parametrize("kind", ["missing", "empty", "text"])
def test_input_without_a_volume_is_refused_before_anything_is_written(shared_bundle, tmp_path, kind):
    given = tmp_path / kind
    if kind != "missing":
        given.mkdir()
    if kind == "text":
        (given / "notes.txt").write_text("nothing here")
    with pytest.raises(InputError, match=kind):
        predict(shared_bundle, [given], tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_folder_with_files_is_not_written_into_unless_asked(shared_bundle, tmp_path):
    image = write_image(tmp_path / "a.nii.gz")
    out = tmp_path / "out"
    predict(shared_bundle, [image], out, device="cpu")
    with pytest.raises(ConfigError, match="--overwrite"):
        predict(shared_bundle, [image], out, device="cpu")
    assert predict(shared_bundle, [image], out, device="cpu", overwrite=True).failures == []


def test_failures_of_an_earlier_run_do_not_stay(shared_bundle, tmp_path):
    image = write_image(tmp_path / "a.nii.gz")
    content = image.read_bytes()
    image.write_bytes(content[:100])
    assert predict(shared_bundle, [image], tmp_path / "out", device="cpu").failures
    image.write_bytes(content)
    predict(shared_bundle, [image], tmp_path / "out", device="cpu", overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a_seg.nii.gz"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_output_is_refused(shared_bundle, tmp_path):
    image = write_image(tmp_path / "a.nii.gz")
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ConfigError, match="cannot be made"):
        predict(shared_bundle, [image], tmp_path / "locked" / "out", device="cpu")


def test_one_input_named_twice_is_predicted_once(tmp_path):
    image = write_image(tmp_path / "a.nii.gz")
    assert [source.name for source in find_sources([image, tmp_path])] == ["a"]


def test_unknown_device_is_refused(shared_bundle, tmp_path):
    image = write_image(tmp_path / "a.nii.gz")
    with pytest.raises(ConfigError, match="--device"):
        predict(shared_bundle, [image], tmp_path / "out", device="tpu")
