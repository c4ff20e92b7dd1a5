from __future__ import annotations

import gzip
import pickle
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import DataLoader, Dataset
from monai.transforms import LoadImage, LoadImaged
from scipy.spatial.transform import Rotation

from medkd.data.volumes import (
    Volume,
    VolumeReader,
    check_pair,
    read_frames,
    read_label,
    read_volume,
    write_image,
    write_segmentation,
)
from medkd.errors import InputError

# MONAI's LoadImage announces that an optional GPU decoder is absent.
pytestmark = pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader:UserWarning")

AFFINE = np.array([[-0.8, 0, 0, 30.5], [0, -0.9, 0, 12.25], [0, 0, 2.5, -7], [0, 0, 0, 1]])
SHAPE = (7, 5, 3)
RNG = np.random.default_rng(0)


def scan(shape: tuple[int, ...] = SHAPE, dtype: type = np.int16) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 100, shape).astype(dtype)


def save(
    path: Path, array: np.ndarray, affine: np.ndarray = AFFINE, edit: Callable | None = None, kind=nib.Nifti1Image
):
    image = kind(array, affine)
    if edit is not None:
        edit(image)
    nib.save(image, path)
    return path


@pytest.fixture(scope="session")
def new_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return tmp_path_factory.mktemp


def edit_header(path: Path, **fields: float) -> Path:
    """Change raw header fields of an uncompressed .nii, past all of nibabel's care."""
    content = bytearray(path.read_bytes())
    header = np.frombuffer(content[:348], nib.nifti1.header_dtype).copy()
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(header.tobytes() + content[348:])
    return path


def oblique(degrees: float, axis: tuple[float, float, float] = (1, 2, 3), spacing=(0.8, 0.9, 2.5)) -> np.ndarray:
    unit = np.array(axis) / np.linalg.norm(axis)
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_rotvec(np.radians(degrees) * unit).as_matrix() @ np.diag(spacing)
    affine[:3, 3] = (-101.3, 55.7, 9.1)
    return affine


# ---- odd but valid -------------------------------------------------------------------------------------------------


def big_endian(folder: Path) -> Path:
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    image = nib.Nifti1Image(scan(), AFFINE, header)
    nib.save(image, folder / "a.nii.gz")
    assert nib.load(folder / "a.nii.gz").header.endianness == ">"
    return folder / "a.nii.gz"


def scaled(folder: Path) -> Path:
    image = nib.Nifti1Image(scan(dtype=np.int16), AFFINE)
    path = folder / "a.nii"
    nib.save(image, path)
    return edit_header(path, scl_slope=0.37, scl_inter=-1024.5)


def pair(folder: Path) -> Path:
    nib.save(nib.Nifti1Pair(scan(), AFFINE), folder / "a.img")
    return folder / "a.hdr"


def pair_by_its_image(folder: Path) -> Path:
    pair(folder)
    return folder / "a.img"


def packed_pair(folder: Path) -> Path:
    nib.save(nib.Nifti1Pair(scan(), AFFINE), folder / "a.img.gz")
    return folder / "a.hdr.gz"


def multi_member(folder: Path) -> Path:
    content = save(folder / "b.nii", scan()).read_bytes()
    path = folder / "a.nii.gz"
    path.write_bytes(b"".join(gzip.compress(content[start : start + 101]) for start in range(0, len(content), 101)))
    return path


def zero_padded(folder: Path) -> Path:
    path = save(folder / "a.nii.gz", scan())
    path.write_bytes(path.read_bytes() + b"\0" * 700)
    return path


def with_extension(folder: Path) -> Path:
    note = nib.nifti1.Nifti1Extension("comment", b"x" * 1000)
    return save(folder / "a.nii.gz", scan(), edit=lambda image: image.header.extensions.append(note))


def both_forms(folder: Path) -> Path:
    def edit(image):
        image.set_sform(oblique(178.9), 1)
        image.set_qform(oblique(178.9), 1)

    return save(folder / "a.nii.gz", scan(), oblique(178.9), edit)


def only_qform(folder: Path) -> Path:
    def edit(image):
        image.set_sform(None, 0)
        image.set_qform(AFFINE, 1)

    return save(folder / "a.nii.gz", scan(), AFFINE, edit)


VALID: dict[str, Callable[[Path], Path]] = {
    "big endian": big_endian,
    "scaled": scaled,
    "pair": pair,
    "pair named by its .img": pair_by_its_image,
    "compressed pair": packed_pair,
    "multi-member gzip": multi_member,
    "zero-padded gzip": zero_padded,
    "header extension": with_extension,
    "oblique, sform and qform": both_forms,
    "only a qform": only_qform,
    "oblique": lambda folder: save(folder / "a.nii.gz", scan(), oblique(33)),
    "uint16": lambda folder: save(folder / "a.nii.gz", scan(dtype=np.uint16) + np.uint16(60000)),
    "int8": lambda folder: save(folder / "a.nii", scan(dtype=np.int8)),
    "uint32": lambda folder: save(folder / "a.nii", scan(dtype=np.uint32)),
    "int64": lambda folder: save(folder / "a.nii.gz", scan(), edit=lambda image: image.set_data_dtype(np.int64)),
    "float64": lambda folder: save(folder / "a.nii.gz", scan(dtype=np.float64) / 7),
    "NIfTI-2": lambda folder: save(folder / "a.nii.gz", scan(), kind=nib.Nifti2Image),
    "one slice": lambda folder: save(folder / "a.nii.gz", scan((7, 5, 1))),
    "one voxel wide": lambda folder: save(folder / "a.nii.gz", scan((1, 5, 9))),
    "4-D with one frame": lambda folder: save(folder / "a.nii.gz", scan((7, 5, 3, 1))),
    "5-D with ones": lambda folder: save(folder / "a.nii.gz", scan((7, 5, 3, 1, 1))),
    "upper-case name": lambda folder: save(folder / "b.nii", scan()).rename(folder / "A.NII"),
}


@pytest.mark.parametrize("name", VALID)
def test_odd_but_valid_files_give_what_nibabel_gives(name: str, tmp_path: Path) -> None:
    path = VALID[name](tmp_path)
    volume = read_volume(path)
    peer = nib.load(path)
    expected = peer.get_fdata(dtype=np.float64).astype(np.float32)
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array, expected.reshape(volume.array.shape, order="F"))
    np.testing.assert_array_equal(volume.affine, peer.affine)
    assert volume.array.flags.writeable
    assert volume.spacing_mm == pytest.approx(np.linalg.norm(peer.affine[:3, :3], axis=0))


def test_unit_sform_beside_a_true_qform_gives_the_qform(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", scan(), np.diag([-1.3, -1.3, 10, 1.0]))
    image = nib.load(path)
    image.set_qform(np.diag([-1.3, -1.3, 10, 1.0]), 1)
    nib.save(image, tmp_path / "b.nii")
    edit_header(tmp_path / "b.nii", sform_code=1, srow_x=(-1, 0, 0, 0), srow_y=(0, -1, 0, 0), srow_z=(0, 0, 1, 0))
    assert read_volume(tmp_path / "b.nii").spacing_mm == pytest.approx((1.3, 1.3, 10))
    assert np.allclose(LoadImage()(tmp_path / "b.nii").affine, read_volume(tmp_path / "b.nii").affine)


def test_every_real_nifti_kind_loads_as_nibabel_loads_it(real_data: Path) -> None:
    files = [
        *real_data.glob("ctmr_totalseg/*.nii.gz"),
        *real_data.glob("msd_spleen_crop/*.nii.gz"),
        *real_data.glob("sct_spinal_cord/**/*.nii.gz"),
        *sorted(real_data.glob("ibsi_sts/*/*.nii.gz"))[:8],
        *sorted(real_data.glob("msd_hippocampus/**/*.nii.gz"))[::40],
    ]
    assert len(files) > 20
    for path in files:
        volume, peer = read_volume(path), nib.load(path)
        np.testing.assert_array_equal(volume.array, peer.get_fdata(dtype=np.float32), err_msg=str(path))
        np.testing.assert_array_equal(volume.affine, peer.affine)


# ---- refused -------------------------------------------------------------------------------------------------------


def conflict(folder: Path) -> Path:
    def edit(image):
        flipped = AFFINE.copy()
        flipped[0] *= -1
        image.set_sform(AFFINE, 1)
        image.set_qform(flipped, 1)

    return save(folder / "a.nii.gz", scan(), AFFINE, edit)


def moved_qform(folder: Path) -> Path:
    def edit(image):
        moved = AFFINE.copy()
        moved[:3, 3] += 4
        image.set_qform(moved, 1)

    return save(folder / "a.nii.gz", scan(), AFFINE, edit)


def with_voxel(value: float) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        array = scan(dtype=np.float32)
        array[2, 3, 1] = value
        return save(folder / "a.nii.gz", array)

    return build


def rgb(folder: Path) -> Path:
    kind = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    return save(folder / "a.nii.gz", np.zeros(SHAPE, kind))


def headed(**fields: float) -> Callable[[Path], Path]:
    return lambda folder: edit_header(save(folder / "a.nii", scan()), **fields)


def written(name: str, content: bytes) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return build


def lone_header(folder: Path) -> Path:
    pair(folder)
    (folder / "a.img").unlink()
    return folder / "a.hdr"


def trailing_garbage(folder: Path) -> Path:
    path = save(folder / "a.nii.gz", scan())
    path.write_bytes(path.read_bytes() + b"garbage")
    return path


def fifo(folder: Path) -> Path:
    import os

    os.mkfifo(folder / "a.nii")
    return folder / "a.nii"


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "absent.nii.gz", "does not exist"),
    "missing, other name": (lambda folder: folder / "absent", "does not exist"),
    "empty folder": (lambda folder: folder, "holds no DICOM file"),
    "empty file": (written("a.nii.gz", b""), "empty"),
    "web page": (written("a.nii.gz", b"<!DOCTYPE html><html>log in</html>"), "web page"),
    "text": (written("a.nii", b"see the readme\n" * 40), "text file"),
    "short text": (written("a.nii", b"hi"), "text file"),
    "Git LFS": (written("a.nii.gz", b"version https://git-lfs.github.com/spec/v1\noid"), "Git LFS"),
    "garbage": (written("a.nii", bytes(range(1, 256)) * 4), "not a NIfTI file"),
    "other format": (written("a.png", b"\x89PNG" + bytes(300)), "neither NIfTI nor DICOM"),
    "pipe": (fifo, "not a regular file"),
    "plain named .gz": (
        lambda folder: save(folder / "b.nii", scan()).rename(folder / "a.nii.gz"), "not gzip-compressed"
    ),
    "gzip named .nii": (lambda folder: save(folder / "b.nii.gz", scan()).rename(folder / "a.nii"), "to .nii.gz"),
    "half a pair": (lone_header, "has no a.img"),
    "Analyze 7.5": (headed(magic=b""), "Analyze"),
    "trailing garbage": (trailing_garbage, "garbage"),
    "surplus data": (headed(dim=(3, 7, 5, 2, 1, 1, 1, 1)), "more data"),
    "too little data": (headed(dim=(3, 7, 5, 4, 1, 1, 1, 1)), "truncated"),
    "impossible dimension": (headed(dim=(3, 7, -5, 3, 1, 1, 1, 1)), "impossible"),
    "nine dimensions": (headed(dim=(9, 7, 5, 3, 1, 1, 1, 1)), "impossible"),
    "NaN": (with_voxel(np.nan), "1 NaN voxel, first at (2, 3, 1)"),
    "Inf": (with_voxel(np.inf), "1 infinite voxel, first at (2, 3, 1)"),
    "-Inf": (with_voxel(-np.inf), "1 infinite voxel"),
    "beyond float32": (
        lambda folder: save(folder / "a.nii", np.where(scan() == scan().max(), 1e300, 0.0)), "infinite"
    ),
    "constant": (lambda folder: save(folder / "a.nii.gz", np.full(SHAPE, 7, np.int16)), "every voxel is 7"),
    "zeros": (lambda folder: save(folder / "a.nii.gz", np.zeros(SHAPE, np.float32)), "every voxel is 0"),
    "2-D": (lambda folder: save(folder / "a.nii.gz", scan((7, 5))), "2-D"),
    "4-D": (lambda folder: save(folder / "a.nii.gz", scan((7, 5, 3, 4))), "--frames"),
    "5-D": (lambda folder: save(folder / "a.nii.gz", scan((7, 5, 3, 1, 3))), "5-D"),
    "RGB": (rgb, "RGB"),
    "complex": (lambda folder: save(folder / "a.nii.gz", scan().astype(np.complex64)), "complex"),
    "sform against qform": (conflict, "sform and qform disagree: orientation LPS against RPS"),
    "sform away from qform": (moved_qform, "origin (30.5, 12.25, -7) against (34.5, 16.25, -3)"),
    "no form": (headed(sform_code=0, qform_code=0), "both 0"),
    "sform against pixdim": (headed(pixdim=(1, 0.5, 0.5, 0.5, 1, 1, 1, 1)), "pixdim (0.5, 0.5, 0.5)"),
    "NaN sform": (headed(srow_x=(np.nan, 0, 0, 0)), "NaN"),
    "zero sform": (headed(srow_x=(0, 0, 0, 0), srow_y=(0, 0, 0, 0), srow_z=(0, 0, 0, 0)), "voxel size (0, 0, 0)"),
    "singular sform": (headed(srow_x=(1, 1, 0, 0), srow_y=(0, 0, 0, 0), srow_z=(0, 0, 1, 0)), "singular"),
    "sheared sform": (headed(srow_x=(1, 0.4, 0, 0), srow_y=(0, 1, 0, 0), srow_z=(0, 0, 1, 0)), "sheared"),
    "zero qform": (headed(sform_code=0, qform_code=1, pixdim=(1, 0, 1, 1, 1, 1, 1, 1)), "voxel size"),
    "wrong quaternion": (headed(sform_code=0, qform_code=1, quatern_b=0.9, quatern_c=0.9), "not a rotation"),
    "NaN quaternion": (headed(sform_code=0, qform_code=1, quatern_b=np.nan), "qform"),
    "micrometers": (headed(xyzt_units=3), "micrometers"),
    "infinite slope": (headed(scl_slope=np.inf), "scaled by inf"),
    "NaN intercept": (headed(scl_slope=2, scl_inter=np.nan), "shifted by nan"),
    "voxels inside the header": (headed(vox_offset=100), "byte 100"),
    "NaN offset": (headed(vox_offset=np.nan), "byte nan"),
    "unknown voxel type": (headed(datatype=77), "unknown (code 77)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_volume_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    build, words = REFUSED[name]
    path = build(tmp_path)
    with pytest.raises(InputError) as caught:
        read_volume(path)
    message = str(caught.value)
    assert words in message, message
    assert str(tmp_path) in message
    assert "\n" not in message


def test_the_messages_for_things_that_are_not_files_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.nii", scan())

    def deny(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    messages = set()
    for name in ("missing", "empty file", "text", "empty folder"):
        folder = tmp_path / name
        folder.mkdir()
        with pytest.raises(InputError) as caught:
            read_volume(REFUSED[name][0](folder))
        messages.add(caught.value.problem)
    monkeypatch.setattr(Path, "open", deny)
    with pytest.raises(InputError, match="no permission") as caught:
        read_volume(path)
    assert len(messages | {caught.value.problem}) == 5


# ---- bombs ---------------------------------------------------------------------------------------------------------


def header_bomb(folder: Path) -> Path:
    path = edit_header(save(folder / "b.nii", scan()), dim=(3, 32767, 32767, 32767, 1, 1, 1, 1))
    (folder / "a.nii.gz").write_bytes(gzip.compress(path.read_bytes()))
    return folder / "a.nii.gz"


def plain_header_bomb(folder: Path) -> Path:
    return edit_header(save(folder / "b.nii", scan()), dim=(3, 32767, 32767, 32767, 1, 1, 1, 1))


def zeros_in_gzip(folder: Path, dims: tuple[int, int, int], zeros: int) -> Path:
    head = edit_header(save(folder / "b.nii", scan()), dim=(3, *dims, 1, 1, 1, 1)).read_bytes()[:352]
    block = gzip.compress(bytes(1 << 24))
    path = folder / "a.nii.gz"
    path.write_bytes(gzip.compress(head) + block * (zeros >> 24))
    return path


def test_bombs_are_refused_at_once_and_in_little_memory(tmp_path: Path) -> None:
    bombs = {
        "header": header_bomb,
        "plain header": plain_header_bomb,
        "stream behind a small header": lambda folder: zeros_in_gzip(folder, (8, 8, 8), 1 << 30),
        "stream as large as the header says": lambda folder: zeros_in_gzip(folder, (1024, 1024, 1024), 1 << 31),
        "stream of a medium size": lambda folder: zeros_in_gzip(folder, (512, 512, 128), 1 << 26),
    }
    for name, build in bombs.items():
        folder = tmp_path / name
        folder.mkdir()
        path = build(folder)
        for read in (read_volume, read_label):
            if name == "stream of a medium size" and read is read_label:
                continue  # an empty mask may pack like this
            tracemalloc.start()
            start = time.perf_counter()
            with pytest.raises(InputError):
                read(path)
            seconds = time.perf_counter() - start
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert seconds < 1, name
            assert peak < 50e6, name


def test_a_large_empty_mask_is_no_bomb(tmp_path: Path) -> None:
    path = save(tmp_path / "mask.nii.gz", np.zeros((256, 256, 160), np.uint8))
    assert path.stat().st_size * 200 < 256 * 256 * 160
    assert not read_label(path).array.any()


# ---- frames --------------------------------------------------------------------------------------------------------


def test_frames_of_a_cine(tmp_path: Path) -> None:
    cine = scan((6, 5, 4, 3), np.float32)
    path = save(tmp_path / "cine.nii.gz", cine)
    for frame in range(3):
        np.testing.assert_array_equal(read_volume(path, frame=frame).array, cine[..., frame])
        np.testing.assert_array_equal(read_volume(f"{path}#frame={frame}").array, cine[..., frame])
    several = read_frames(path, [2, 0])
    np.testing.assert_array_equal(several[0].array, cine[..., 2])
    np.testing.assert_array_equal(several[1].array, cine[..., 0])
    assert several[0].frame == 2
    with pytest.raises(InputError, match="holds 3 frames and no frame 3"):
        read_volume(path, frame=3)
    with pytest.raises(InputError, match="from 0"):
        read_volume(path, frame=-1)
    single = save(tmp_path / "still.nii.gz", cine[..., 0])
    assert read_volume(single, frame=0).frame is None
    with pytest.raises(InputError, match="holds 1 frame and no frame 1"):
        read_volume(single, frame=1)


def test_a_bad_voxel_counts_only_in_its_own_frame(tmp_path: Path) -> None:
    cine = scan((6, 5, 4, 3), np.float32)
    cine[1, 2, 3, 1] = np.nan
    path = save(tmp_path / "cine.nii.gz", cine)
    read_volume(path, frame=0)
    with pytest.raises(InputError, match=r"frame 1: has 1 NaN voxel, first at \(1, 2, 3\)"):
        read_volume(path, frame=1)


def test_a_label_map_of_one_frame_serves_that_frame(tmp_path: Path) -> None:
    still = save(tmp_path / "still.nii.gz", (scan((6, 5, 4)) % 3).astype(np.uint8))
    moving = save(tmp_path / "moving.nii.gz", (scan((6, 5, 4, 3)) % 3).astype(np.uint8))
    assert read_label(still, frame=2).frame is None
    np.testing.assert_array_equal(read_label(moving, frame=2).array, scan((6, 5, 4, 3))[..., 2] % 3)
    with pytest.raises(InputError, match="4-D"):
        read_label(moving)


# ---- labels --------------------------------------------------------------------------------------------------------


def label_file(folder: Path, values: np.ndarray | list, dtype: type = np.float32) -> Path:
    array = np.zeros(SHAPE, dtype)
    array.flat[: len(values)] = values
    return save(folder / "label.nii.gz", array)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_labels_are_integers_however_they_were_stored(dtype: type, tmp_path: Path) -> None:
    label = read_label(label_file(tmp_path, [0, 2, 1, 2], dtype), labels=[0, 1, 2])
    assert label.array.dtype.kind in "iu"
    assert np.unique(label.array).tolist() == [0, 1, 2]


@pytest.mark.parametrize("values", [[255], [3], [2, 3, 1]])
def test_label_value_that_is_not_listed_is_refused(values: list, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the labels are 0, 1, 2"):
        read_label(label_file(tmp_path, values, np.uint8), labels={0, 1, 2})


@pytest.mark.parametrize(
    ("value", "words"),
    [(-1, "negative"), (1.5, "such as 1.5 at (0, 0, 0)"), (np.nan, "NaN"), (np.inf, "infinite"), (1e30, "1e+30")],
)
@pytest.mark.parametrize("labels", [None, (0, 1)])
def test_label_that_is_no_natural_number_is_refused(value: float, words: str, labels, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_label(label_file(tmp_path, [value]), labels=labels)
    assert words in str(caught.value)


def test_negative_integer_label_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"such as -1 at \(0, 0, 1\)"):
        read_label(label_file(tmp_path, [0, -1], np.int8), labels=(0, 1))


def test_empty_label_map_is_legitimate(tmp_path: Path) -> None:
    assert not read_label(label_file(tmp_path, [], np.uint8), labels=(0, 1)).array.any()


def test_large_label_values_survive(tmp_path: Path) -> None:
    path = label_file(tmp_path, [40000, 70000], np.uint32)
    assert read_label(path, labels=(0, 40000, 70000)).array.max() == 70000
    with pytest.raises(InputError, match="such as 70000"):
        read_label(path, labels=(0, 40000))


# ---- pairs ---------------------------------------------------------------------------------------------------------


def volume(affine: np.ndarray = AFFINE, shape: tuple[int, ...] = SHAPE, name: str = "image.nii") -> Volume:
    return Volume(np.zeros(shape, np.float32), np.asarray(affine, float), Path(name))


def changed(row: int, column: int, amount: float) -> np.ndarray:
    affine = AFFINE.copy()
    affine[row, column] += amount
    return affine


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (volume(shape=(7, 5, 4)), "shape 7x5x4 against 7x5x3"),
        (volume(changed(2, 2, 0.01)), "voxel size (0.8, 0.9, 2.51) against (0.8, 0.9, 2.5) mm"),
        (volume(changed(1, 3, 0.1)), "origin (30.5, 12.35, -7) against (30.5, 12.25, -7) mm"),
        (volume(AFFINE @ np.diag([-1, 1, 1, 1])), "orientation RPS against LPS"),
        (volume(oblique(0.05) - oblique(0) + AFFINE), "direction of"),
    ],
)
def test_label_on_other_voxels_is_refused_with_both_numbers(label: Volume, words: str) -> None:
    with pytest.raises(InputError) as caught:
        check_pair(volume(), label)
    assert words in str(caught.value)
    assert "image.nii" in str(caught.value)


@given(st.floats(-180, 180), st.tuples(*[st.floats(0.1, 1)] * 3), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_float_noise_never_parts_a_pair(degrees: float, axis: tuple, seed: int) -> None:
    affine = oblique(degrees, axis)
    noise = 1 + np.random.default_rng(seed).uniform(-1, 1, (4, 4)) * 2e-7
    noisy = (affine.astype(np.float32) * noise).astype(np.float64)
    noisy[3] = affine[3]
    check_pair(volume(affine), volume(noisy))


# ---- MONAI ---------------------------------------------------------------------------------------------------------


@given(
    shape=st.tuples(*[st.integers(2, 9)] * 3),
    dtype=st.sampled_from([np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64]),
    degrees=st.floats(-180, 180),
    axis=st.tuples(*[st.floats(0.1, 1)] * 3),
    scaling=st.sampled_from([None, (2.0, 0.0), (0.1, -3.7), (1.0, 5.0)]),
    both=st.booleans(),
    suffix=st.sampled_from([".nii", ".nii.gz"]),
)
@settings(max_examples=40, deadline=None)
def test_swapping_the_reader_changes_nothing(
    tmp_path_factory, shape, dtype, degrees, axis, scaling, both, suffix
) -> None:
    path = tmp_path_factory.mktemp("reader") / f"a{suffix}"
    affine = oblique(degrees, axis)
    image = nib.Nifti1Image(scan(shape, dtype), affine)
    if both:
        image.set_qform(affine, 2)
    image.header.set_slope_inter(*(scaling or (None, None)))
    image.set_data_dtype(dtype)
    nib.save(image, path)
    ours, theirs = LoadImage(reader=VolumeReader)(path), LoadImage()(path)
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours.as_tensor(), theirs.as_tensor(), rtol=0, atol=0)
    for key in ("affine", "original_affine", "spatial_shape"):
        assert np.array_equal(ours.meta[key], theirs.meta[key]), key
    assert ours.meta["space"] == theirs.meta["space"]
    assert ours.meta["filename_or_obj"] == theirs.meta["filename_or_obj"]
    assert np.isnan(ours.meta["original_channel_dim"]) == np.isnan(theirs.meta["original_channel_dim"])


def test_reader_works_from_a_configuration_for_image_and_label(tmp_path: Path) -> None:
    image = save(tmp_path / "image.nii.gz", scan())
    empty = save(tmp_path / "label.nii.gz", np.zeros(SHAPE, np.uint8))
    for reader in (VolumeReader, "medkd.data.volumes.VolumeReader", VolumeReader()):
        load = LoadImaged(keys=["image", "label"], reader=reader, ensure_channel_first=True)
        item = load({"image": str(image), "label": str(empty)})
        assert item["image"].shape == item["label"].shape == (1, *SHAPE)
    channels = LoadImage(reader=VolumeReader, ensure_channel_first=True)([image, image])
    assert channels.shape == (2, *SHAPE)


def test_no_other_reader_takes_what_ours_refused(tmp_path: Path) -> None:
    path = with_voxel(np.nan)(tmp_path)
    assert LoadImage()(path).isnan().any()
    with pytest.raises(InputError, match="NaN"):
        LoadImage(reader=VolumeReader)(path)
    other = save(tmp_path / "b.nii.gz", scan(), oblique(10))
    with pytest.raises(InputError, match="does not lie on"):
        LoadImage(reader=VolumeReader)([save(tmp_path / "c.nii.gz", scan()), other])


def test_reader_survives_pickling_and_workers(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", scan())
    reader = pickle.loads(pickle.dumps(VolumeReader(may_be_constant=False)))
    assert not reader.may_be_constant
    load = LoadImaged(keys="image", reader=reader, ensure_channel_first=True)
    loader = DataLoader(Dataset([{"image": str(path)}] * 2, load), batch_size=2, num_workers=1)
    batch = next(iter(loader))
    np.testing.assert_array_equal(batch["image"][1, 0], scan().astype(np.float32))


def test_reader_picks_a_frame_by_name(tmp_path: Path) -> None:
    cine = scan((6, 5, 4, 3), np.float32)
    path = save(tmp_path / "cine.nii.gz", cine)
    np.testing.assert_array_equal(LoadImage(reader=VolumeReader)(f"{path}#frame=2"), cine[..., 2])
    assert VolumeReader().verify_suffix(f"{path}#frame=2")
    assert not VolumeReader().verify_suffix(tmp_path / "a.png")


def test_free_text_of_the_header_goes_nowhere(tmp_path: Path) -> None:
    def edit(image):
        image.header["descrip"] = b"DOE^JANE 19700101"
        image.header["db_name"] = b"DOE^JANE"

    path = save(tmp_path / "a.nii.gz", scan(), edit=edit)
    assert "DOE" not in repr(LoadImage(reader=VolumeReader)(path).meta)
    write_segmentation(tmp_path / "b.nii", scan() > 3, like=read_volume(path))
    assert b"DOE" not in (tmp_path / "b.nii").read_bytes()


# ---- segmentations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("highest", "kind"), [(1, "u1"), (255, "u1"), (256, "u2"), (40000, "u2"), (70000, "i4")])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_segmentation_is_stored_wide_enough(highest: int, kind: str, suffix: str, tmp_path: Path) -> None:
    array = np.zeros(SHAPE, np.int64)
    array[1, 2, 1] = highest
    path = tmp_path / f"seg{suffix}"
    write_segmentation(path, array, AFFINE)
    image = nib.load(path)
    assert image.get_data_dtype() == np.dtype(kind)
    np.testing.assert_array_equal(read_label(path).array, array)
    assert int(image.header["sform_code"]) == int(image.header["qform_code"]) == 1
    assert image.header.get_xyzt_units()[0] == "mm"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@given(st.floats(-180, 180), st.tuples(*[st.floats(0.1, 1)] * 3), st.booleans())
@settings(max_examples=30, deadline=None)
def test_segmentation_lies_on_its_image(new_folder, degrees: float, axis: tuple, flip: bool) -> None:
    affine = oblique(degrees, axis) @ np.diag([-1 if flip else 1, 1, 1, 1])
    image = volume(affine)
    path = new_folder("seg") / "seg.nii"
    write_segmentation(path, scan() > 50, like=image)
    label = read_label(path)
    check_pair(image, label)
    header = nib.load(path).header
    np.testing.assert_allclose(header.get_sform(), affine, atol=1e-5)
    if header["qform_code"]:
        np.testing.assert_allclose(header.get_qform(), affine, atol=0.01)


def test_qform_that_would_lose_a_small_tilt_is_not_written(tmp_path: Path) -> None:
    """A flip puts the quaternion near its half turn, where float32 has no digits left for the tilt."""
    tilted = oblique(0.2421875, (0.75, 0.25, 0.25)) @ np.diag([-1, 1, 1, 1])
    write_segmentation(tmp_path / "tilted.nii", scan() > 50, tilted)
    write_segmentation(tmp_path / "straight.nii", scan() > 50, oblique(30))
    assert int(nib.load(tmp_path / "tilted.nii").header["qform_code"]) == 0
    assert int(nib.load(tmp_path / "straight.nii").header["qform_code"]) == 1
    for name, affine in (("tilted.nii", tilted), ("straight.nii", oblique(30))):
        np.testing.assert_allclose(read_label(tmp_path / name).affine, affine, atol=1e-5)


def test_sheared_or_misplaced_segmentation_is_refused(tmp_path: Path) -> None:
    sheared = np.eye(4)
    sheared[0, 1] = 0.004  # within what is read: no quaternion can hold it
    write_segmentation(tmp_path / "a.nii", scan() > 3, sheared)
    assert int(nib.load(tmp_path / "a.nii").header["qform_code"]) == 0
    np.testing.assert_allclose(read_label(tmp_path / "a.nii").affine, sheared, atol=1e-6)
    for array, affine, like, words in (
        (scan(), np.eye(4) * np.nan, None, "NaN"),
        (scan((7, 5)), AFFINE, None, "not a volume"),
        (scan() - 100, AFFINE, None, "cannot be stored"),
        (scan().astype(np.int64) + 2**31, AFFINE, None, "cannot be stored"),
        (scan(dtype=np.float32), AFFINE, None, "not integer"),
        (scan(), None, None, "cannot be placed"),
        (scan((7, 5, 4)), None, volume(), "shape"),
        (scan(), oblique(5), volume(), "does not lie on"),
    ):
        with pytest.raises(InputError) as caught:
            write_segmentation(tmp_path / "b.nii", array, affine, like)
        assert words in str(caught.value)
    with pytest.raises(InputError, match="not a NIfTI name"):
        write_segmentation(tmp_path / "b.nrrd", scan(), AFFINE)
    assert not (tmp_path / "b.nii").exists()


def test_intensities_are_written_as_float32_where_the_image_lies(tmp_path: Path) -> None:
    image = volume()
    values = np.linspace(-1000.5, 3000.25, image.array.size).reshape(image.array.shape)
    write_image(tmp_path / "a.nii.gz", values, like=image)
    written = read_volume(tmp_path / "a.nii.gz")
    assert nib.load(tmp_path / "a.nii.gz").get_data_dtype() == np.float32
    np.testing.assert_allclose(written.array, values.astype(np.float32))
    np.testing.assert_allclose(written.affine, image.affine, atol=1e-6)
    with pytest.raises(InputError, match="not finite"):
        write_image(tmp_path / "b.nii.gz", np.full(image.array.shape, np.nan), like=image)
    with pytest.raises(InputError, match="shape"):
        write_image(tmp_path / "b.nii.gz", values[1:], like=image)
    assert not (tmp_path / "b.nii.gz").exists()
