from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from monai.transforms import LoadImage
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid
from scipy.spatial.transform import Rotation

from medkd.data.dicom import list_series
from medkd.data.volumes import VolumeReader, read_volume
from medkd.errors import InputError

ROWS, COLUMNS, COUNT = 6, 5, 7
SERIES = "1.2.826.0.1.3680043.8.498.7"
NAME = "DOE^JANE"
AXIAL = np.eye(3)
OBLIQUE = Rotation.from_euler("xyz", (20, -35, 12), degrees=True).as_matrix()
VOXELS = np.random.default_rng(0).integers(-900, 900, (COUNT, ROWS, COLUMNS)).astype(np.int16)


def one_slice(index: int, directions: np.ndarray = AXIAL, distance: float = 2.5) -> FileDataset:
    """Slice ``index`` of the series whose first voxel lies at (-50, -40, 30) mm."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[str(index)])
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.SeriesInstanceUID, ds.StudyInstanceUID = SERIES, SERIES + ".1"
    ds.PatientName, ds.PatientID, ds.PatientBirthDate = NAME, "19700101-DOE", "19700101"
    ds.Modality, ds.InstanceNumber = "CT", index + 1
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = ROWS, COLUMNS, 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    ds.PixelSpacing = [0.7, 0.9]
    ds.ImageOrientationPatient = [f"{value:.10f}" for value in directions[:, :2].T.ravel()]
    position = np.array([-50.0, -40.0, 30.0]) + index * distance * directions[:, 2]
    ds.ImagePositionPatient = [f"{value:.8f}" for value in position]
    ds.SliceThickness = "2.5"
    ds.RescaleSlope, ds.RescaleIntercept = "1", "0"
    ds.PixelData = VOXELS[index].tobytes()
    return ds


def series(folder: Path, edit: Callable[[list[FileDataset]], object] | None = None, **how) -> Path:
    """A folder with the series; ``edit`` may change the slices, or return others."""
    folder.mkdir(exist_ok=True)
    with warnings.catch_warnings(), pydicom.config.disable_value_validation():
        warnings.simplefilter("ignore")  # what the test writes may be odd; reading it must still warn of nothing
        slices = [one_slice(index, **how) for index in range(COUNT)]
        slices = (edit(slices) if edit else None) or slices
        for index, ds in enumerate(slices):
            ds.save_as(folder / f"{(index * 5) % 11:03d}_{index}.dcm", enforce_file_format=True)
    return folder


def each(**tags: object) -> Callable[[list[FileDataset]], None]:
    def edit(slices: list[FileDataset]) -> None:
        for ds in slices:
            for tag, value in tags.items():
                setattr(ds, tag, value)

    return edit


def only(index: int, **tags: object) -> Callable[[list[FileDataset]], None]:
    return lambda slices: each(**tags)([slices[index]])


def by_simpleitk(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(X, Y, Z) and affine to RAS mm, as SimpleITK has them."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) @ np.diag(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).T, np.diag([-1, -1, 1, 1]) @ affine


@pytest.mark.parametrize(
    "directions", [np.eye(3), OBLIQUE, np.eye(3)[:, [1, 2, 0]]], ids=["axial", "oblique", "sagittal"]
)
def test_series_equals_what_simpleitk_reads(directions: np.ndarray, tmp_path: Path) -> None:
    folder = series(tmp_path / "s", each(RescaleSlope="1.5", RescaleIntercept="-1024"), directions=directions)
    volume = read_volume(folder)
    array, affine = by_simpleitk(folder)
    assert volume.array.shape == (COLUMNS, ROWS, COUNT)
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array, array.astype(np.float32))
    np.testing.assert_allclose(volume.affine, affine, atol=1e-5)
    assert volume.spacing_mm == pytest.approx((0.9, 0.7, 2.5))


def shuffled_numbers(slices: list[FileDataset]) -> None:
    for ds, number in zip(slices, [4, 1, 6, 2, 7, 3, 5], strict=True):
        ds.InstanceNumber = number


def descending(slices: list[FileDataset]) -> list[FileDataset]:
    return slices[::-1]


def slopes(slices: list[FileDataset]) -> None:
    for index, ds in enumerate(slices):
        ds.RescaleSlope, ds.RescaleIntercept = str(1 + index / 4), str(-index)


def rounded_positions(slices: list[FileDataset]) -> None:
    for ds in slices:
        ds.ImagePositionPatient = [f"{float(value):.2f}" for value in ds.ImagePositionPatient]


def long_decimals(slices: list[FileDataset]) -> None:
    for ds in slices:
        ds.ImagePositionPatient = [f"{float(value):.22f}" for value in ds.ImagePositionPatient]
        ds.PixelSpacing = ["0.70000000000000000000000", "0.9000000000000000000000000"]


def run_length(slices: list[FileDataset]) -> None:
    for ds in slices:
        ds.compress(pydicom.uid.RLELossless)


GOOD: dict[str, Callable[[list[FileDataset]], object] | None] = {
    "plain": None,
    "equal InstanceNumbers": each(InstanceNumber=1),
    "shuffled InstanceNumbers": shuffled_numbers,
    "descending": descending,
    "positions rounded to 0.01 mm": rounded_positions,
    "over-long decimal strings": long_decimals,
    "run-length encoded": run_length,
    "implicit VR": lambda slices: (
        each(file_meta=slices[0].file_meta)(slices)
        or setattr(slices[0].file_meta, "TransferSyntaxUID", ImplicitVRLittleEndian)
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_slices_lie_in_the_order_of_their_positions(name: str, tmp_path: Path) -> None:
    volume = read_volume(series(tmp_path / "s", GOOD[name]))
    np.testing.assert_array_equal(volume.array, VOXELS.transpose(2, 1, 0))
    np.testing.assert_allclose(volume.affine[:3, 3], (50, 40, 30), atol=0.011)


def test_every_slice_is_rescaled_by_its_own_numbers(tmp_path: Path) -> None:
    array = read_volume(series(tmp_path / "s", slopes)).array
    for index in range(COUNT):
        np.testing.assert_array_equal(array[..., index], VOXELS[index].T * (1 + index / 4) - index)


def test_one_slice_takes_its_thickness(tmp_path: Path) -> None:
    assert read_volume(series(tmp_path / "s", lambda slices: slices[:1])).spacing_mm == pytest.approx((0.9, 0.7, 2.5))
    with pytest.raises(InputError, match="without a SliceThickness"):
        read_volume(series(tmp_path / "t", lambda slices: each(SliceThickness=None)(slices) or slices[:1]))


# ---- refused -------------------------------------------------------------------------------------------------------


def without(*indices: int) -> Callable[[list[FileDataset]], list[FileDataset]]:
    return lambda slices: [ds for index, ds in enumerate(slices) if index not in indices]


def doubled(slices: list[FileDataset]) -> list[FileDataset]:
    return [*slices, slices[3]]


def tilted(slices: list[FileDataset]) -> None:
    for index, ds in enumerate(slices):
        ds.ImagePositionPatient = [-50, -40 + 2.5 * np.tan(np.radians(12)) * index, 30 + 2.5 * index]


def shifted(slices: list[FileDataset]) -> None:
    slices[3].ImagePositionPatient = [-50 + 3, -40, 30 + 2.5 * 3]


def uneven(slices: list[FileDataset]) -> None:
    slices[3].ImagePositionPatient = [-50, -40, 30 + 2.5 * 3 + 0.4]


def cropped(slices: list[FileDataset]) -> None:
    slices[2].Rows, slices[2].PixelData = ROWS - 1, VOXELS[2, 1:].tobytes()


REFUSED: dict[str, tuple[Callable[[list[FileDataset]], object], str]] = {
    "missing slice": (without(3), "1 slice is missing: 5 mm instead of 2.5 mm"),
    "missing slices": (without(2, 3), "2 slices are missing: 7.5 mm instead of 2.5 mm"),
    "duplicate": (doubled, "1 slice lies where another one does"),
    "all in one place": (each(ImagePositionPatient=[0, 0, 0]), "6 slices lie where another one does"),
    "uneven": (uneven, "unevenly spaced"),
    "gantry tilt": (tilted, "12 degrees of gantry tilt"),
    "shifted slice": (shifted, "do not lie on one line: 3 mm"),
    "two series": (only(2, SeriesInstanceUID="1.2.3"), "holds 2 series"),
    "two patients": (only(2, PatientID="other"), "mixes several patients"),
    "two names": (only(2, PatientName="OTHER^NAME"), "mixes several patients"),
    "other orientation": (only(2, ImageOrientationPatient=[0, 1, 0, 1, 0, 0]), "its orientation"),
    "other spacing": (only(2, PixelSpacing=[0.7, 0.91]), "its PixelSpacing (0.7, 0.91) differs from (0.7, 0.9)"),
    "other size": (cropped, "its size (5, 5) differs from (6, 5)"),
    "no position": (only(2, ImagePositionPatient=None), "no ImagePositionPatient"),
    "no orientation": (each(ImageOrientationPatient=None), "no ImageOrientationPatient"),
    "impossible orientation": (each(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "orthogonal"),
    "zero spacing": (each(PixelSpacing=[0, 0]), "PixelSpacing is"),
    "zero slope": (each(RescaleSlope=0), "RescaleSlope is 0"),
    "MONOCHROME1": (each(PhotometricInterpretation="MONOCHROME1"), "MONOCHROME1"),
    "palette": (each(PhotometricInterpretation="PALETTE COLOR"), "PALETTE COLOR"),
    "color": (each(SamplesPerPixel=3, PhotometricInterpretation="RGB"), "color"),
    "lookup table": (each(ModalityLUTSequence=[Dataset()]), "through a table"),
    "screen capture of frames": (each(NumberOfFrames=4), "4 frames without saying where"),
    "no series": (each(SeriesInstanceUID=""), "no SeriesInstanceUID"),
    "truncated slice": (only(2, PixelData=VOXELS[2].tobytes()[:-10]), "is truncated: 50 of 60 bytes"),
    "constant": (each(PixelData=bytes(2 * ROWS * COLUMNS)), "every voxel is 0"),
    "unknown compression": (lambda slices: video(slices), "cannot be decoded here"),
}


def video(slices: list[FileDataset]) -> None:
    for ds in slices:
        ds.file_meta.TransferSyntaxUID = pydicom.uid.HTJ2KLossless
        ds.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f" + bytes(30)])
        ds["PixelData"].is_undefined_length = True


@pytest.mark.parametrize("name", REFUSED)
def test_bad_series_is_refused_in_one_line_without_its_patient(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    edit, words = REFUSED[name]
    folder = series(tmp_path / "s", edit)
    with caplog.at_level(logging.DEBUG), pytest.raises(InputError) as caught:
        read_volume(folder)
    message = str(caught.value)
    assert words in message, message
    assert str(folder) in message
    said = message + caplog.text + "".join(capfd.readouterr())
    assert not any(text in said for text in ("DOE", "JANE", "1970", "OTHER^NAME"))


def test_series_are_listed_and_one_can_be_chosen(tmp_path: Path) -> None:
    folder = series(tmp_path / "s")
    shorter = series(
        folder / "other", lambda slices: each(SeriesInstanceUID="1.2.3", PatientID="x")(slices) or slices[:4]
    )
    with pytest.raises(InputError) as caught:
        read_volume(folder)
    assert f"holds 2 series of 2 patients; choose one with --series: {SERIES} (7 slices), 1.2.3 (4 slices)" in str(
        caught.value
    )
    assert list_series(folder) == {SERIES: 7, "1.2.3": 4}
    assert read_volume(folder, series="1.2.3").array.shape == (COLUMNS, ROWS, 4)
    assert read_volume(shorter).array.shape == (COLUMNS, ROWS, 4)
    with pytest.raises(InputError, match=r"has no series 9\.9; choose one of"):
        read_volume(folder, series="9.9")


def test_files_of_a_broken_copy_are_refused(tmp_path: Path) -> None:
    folder = series(tmp_path / "s")
    files = sorted(folder.iterdir())
    whole = files[-1].read_bytes()
    for name, content, words in (
        ("empty", b"", "is empty"),
        ("web page", b"<html>" + b" " * 300, "is not DICOM"),
        ("zeros", bytes(len(whole)), "is not DICOM"),
        ("no pixels", whole[:-100], "truncated"),
        ("half a header", whole[:400], "truncated"),
        ("preamble", whole[:140], ""),
    ):
        files[-1].write_bytes(content)
        with pytest.raises(InputError) as caught:
            read_volume(folder)
        assert words in str(caught.value), name
        assert files[-1].name in str(caught.value), (name, str(caught.value))


def test_no_truncation_of_a_slice_goes_unnoticed(tmp_path: Path) -> None:
    folder = series(tmp_path / "s")
    file = sorted(folder.iterdir())[0]  # an outer slice: no gap would show that it is gone
    whole = file.read_bytes()
    for length in [*range(0, len(whole), 23), len(whole) - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(InputError):
            read_volume(folder)


def test_companions_of_a_series_are_left_alone(tmp_path: Path) -> None:
    folder = series(tmp_path / "s")
    (folder / "LICENSE").write_text("CC BY")
    (folder / "notes.txt").write_text("x")
    (folder / ".hidden").write_bytes(b"")
    report = one_slice(0)
    for tag in ("Rows", "Columns", "PixelData"):
        del report[tag]
    report.SOPClassUID = report.file_meta.MediaStorageSOPClassUID = pydicom.uid.BasicTextSRStorage
    report.SeriesInstanceUID = "1.2.3.4"
    report.save_as(folder / "report.dcm", enforce_file_format=True)
    assert read_volume(folder).array.shape == (COLUMNS, ROWS, COUNT)


def test_a_single_slice_is_not_taken_for_its_series(tmp_path: Path) -> None:
    folder = series(tmp_path / "s")
    with pytest.raises(InputError, match="one slice of a DICOM series"):
        read_volume(next(iter(folder.iterdir())))
    with pytest.raises(InputError, match="no frame 0"):
        read_volume(folder, frame=0)


# ---- enhanced multi-frame ------------------------------------------------------------------------------------------


def enhanced(path: Path, order: list[int], spacing_per_frame: bool = False) -> Path:
    """The same volume as one file whose frames are stored in another order."""
    ds = one_slice(0)
    for tag in ("PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient", "RescaleSlope", "RescaleIntercept"):
        del ds[tag]
    ds.NumberOfFrames = len(order)
    ds.PixelData = VOXELS[order].tobytes()
    measures, plane = Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [0.7, 0.9], 2.5
    plane.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared = Dataset()
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    ds.SharedFunctionalGroupsSequence = [shared]
    ds.PerFrameFunctionalGroupsSequence = []
    for index in order:
        position, scaling, group = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = [-50, -40, 30 + 2.5 * index]
        scaling.RescaleSlope, scaling.RescaleIntercept = 1 + index, -index
        group.PlanePositionSequence, group.PixelValueTransformationSequence = [position], [scaling]
        ds.PerFrameFunctionalGroupsSequence.append(group)
    ds.save_as(path, enforce_file_format=True)
    return path


def test_enhanced_file_is_read_frame_by_frame(tmp_path: Path) -> None:
    path = enhanced(tmp_path / "e.dcm", [3, 0, 6, 1, 5, 2, 4])
    for source in (path, tmp_path):
        volume = read_volume(source)
        for index in range(COUNT):
            np.testing.assert_array_equal(volume.array[..., index], VOXELS[index].T * (1.0 + index) - index)
        np.testing.assert_allclose(volume.affine, [[-0.9, 0, 0, 50], [0, -0.7, 0, 40], [0, 0, 2.5, 30], [0, 0, 0, 1]])
    assert list_series(tmp_path) == {SERIES: 7}


def test_enhanced_file_with_a_gap_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"1 slice is missing: .* frame 2"):
        read_volume(enhanced(tmp_path / "e.dcm", [0, 1, 2, 4, 5]))


# ---- files of other makers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["CT_small.dcm", "MR_small.dcm", "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm",
     "MR_small_bigendian.dcm", "MR_small_implicit.dcm"],
)  # fmt: skip
def test_real_files_and_compressions_equal_simpleitk(name: str, tmp_path: Path) -> None:
    shutil.copy(get_testdata_file(name), tmp_path / name)
    volume = read_volume(tmp_path)
    image = sitk.ReadImage(str(tmp_path / name))
    np.testing.assert_array_equal(volume.array, sitk.GetArrayFromImage(image).T.astype(np.float32))
    np.testing.assert_allclose(volume.affine[:3, 3] * (-1, -1, 1), image.GetOrigin(), atol=1e-4)


@pytest.mark.parametrize("name", ["MR_truncated.dcm", "rtstruct.dcm", "SC_rgb_rle.dcm", "examples_palette.dcm"])
def test_real_files_that_are_no_volume_are_refused(name: str, tmp_path: Path) -> None:
    shutil.copy(get_testdata_file(name), tmp_path / name)
    with pytest.raises(InputError):
        read_volume(tmp_path)


@pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader:UserWarning")
def test_series_comes_through_monai(tmp_path: Path) -> None:
    folder = series(tmp_path / "s")
    image = LoadImage(reader=VolumeReader)(folder)
    np.testing.assert_array_equal(image, VOXELS.transpose(2, 1, 0))
    assert "DOE" not in repr(image.meta)
    both = series(tmp_path / "s" / "t", each(SeriesInstanceUID="1.2.3"))
    assert LoadImage(reader=VolumeReader(series="1.2.3"))(folder).shape == LoadImage(reader=VolumeReader)(both).shape


def test_damage_anywhere_in_a_slice_never_raises_anything_else(tmp_path: Path) -> None:
    folder = series(tmp_path / "s")
    file = sorted(folder.iterdir())[0]
    whole = file.read_bytes()
    rng = np.random.default_rng(1)
    for _ in range(80):
        damaged = bytearray(whole)
        start = int(rng.integers(128, len(whole)))
        piece = rng.bytes(int(rng.integers(1, 9)))
        damaged[start : start + len(piece)] = piece
        file.write_bytes(damaged)
        with suppress(InputError):
            read_volume(folder)
