"""Damage to small files at very many places. A .nii.gz never loads with other content; a .nii has no checksum, so only
damage to its structure can be seen, and nothing but an InputError ever comes out."""

from __future__ import annotations

import gzip
import time
from contextlib import suppress
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medkd.data.volumes import read_label, read_volume
from medkd.errors import InputError

SHAPE = (8, 8, 8)
AFFINE = np.diag([-1.0, -1.0, 2.0, 1.0])


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    image = nib.Nifti1Image(np.random.default_rng(0).integers(0, 50, SHAPE).astype(np.int16), AFFINE)
    image.set_qform(AFFINE, 1)
    content = image.to_bytes()
    half = len(content) // 2
    return {
        ".nii": content,
        ".nii.gz": gzip.compress(content, mtime=0),
        "members.nii.gz": gzip.compress(content[:half]) + gzip.compress(content[half:]),
    }


def load(path: Path, content: bytes) -> tuple[np.ndarray, np.ndarray] | None:
    """Array and affine, or None where the file is refused."""
    path.write_bytes(content)
    try:
        volume = read_volume(path)
    except InputError as error:
        named = str(path.parent) in str(error)
        return None if named else pytest.fail(f"{error} does not name the file")
    return volume.array, volume.affine


@pytest.mark.parametrize("name", [".nii", ".nii.gz", "members.nii.gz"])
def test_every_truncation_is_refused(name: str, good: dict[str, bytes], tmp_path: Path) -> None:
    content, path = good[name], tmp_path / f"a{name}"
    assert load(path, content) is not None
    lengths = {*range(len(content) - 40, len(content)), *range(0, len(content), 7)}
    for length in sorted(lengths):
        assert load(path, content[:length]) is None, length


@pytest.mark.parametrize("name", [".nii.gz", "members.nii.gz"])
def test_no_flipped_bit_in_gzip_changes_a_voxel(name: str, good: dict[str, bytes], tmp_path: Path) -> None:
    content, path = good[name], tmp_path / f"a{name}"
    array, affine = load(path, content) or (np.empty(0), np.empty(0))
    refused = 0
    for bit in range(0, 8 * len(content), 13):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        result = load(path, bytes(damaged))
        if result is None:
            refused += 1
        else:
            # Not every bit means something: the time stamp, or which of two equal pieces of text is copied.
            np.testing.assert_array_equal(result[0], array)
            np.testing.assert_array_equal(result[1], affine)
            assert gzip.decompress(damaged) == gzip.decompress(content)
    assert refused > 300


def test_a_flipped_bit_in_plain_nifti_is_refused_or_confined_to_its_bytes(
    good: dict[str, bytes], tmp_path: Path
) -> None:
    content, path = good[".nii"], tmp_path / "a.nii"
    array, _ = load(path, content) or (np.empty(0), None)
    refused = 0
    for bit in [*range(0, 8 * 352, 5), *range(8 * 352, 8 * len(content), 211)]:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        result = load(path, bytes(damaged))
        refused += result is None
        if result is not None and bit >= 8 * 352:
            assert (result[0] != array).sum() <= 1
    assert refused > 50


@pytest.mark.parametrize("field", ["sizeof_hdr", "dim", "datatype", "magic", "srow_x", "vox_offset"])
def test_structural_damage_to_plain_nifti_is_refused(field: str, good: dict[str, bytes], tmp_path: Path) -> None:
    content, path = good[".nii"], tmp_path / "a.nii"
    kind, offset = nib.nifti1.header_dtype.fields[field][:2]
    for bit in range(8 * offset, 8 * (offset + min(kind.itemsize, 8))):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        result = load(path, bytes(damaged))
        # The last bits of a number drown in the tolerance between sform and qform.
        assert result is None or np.allclose(result[1], AFFINE, atol=2e-3), bit


def test_random_bytes_never_raise_anything_else(good: dict[str, bytes], tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    start = time.perf_counter()
    for name in (".nii", ".nii.gz"):
        for _ in range(60):
            damaged = bytearray(good[name])
            begin = int(rng.integers(0, len(damaged)))
            piece = rng.bytes(int(rng.integers(1, 64)))
            damaged[begin : begin + len(piece)] = piece
            load(tmp_path / f"a{name}", bytes(damaged))
            with suppress(InputError):
                read_label(tmp_path / f"a{name}", labels=range(50))
    assert time.perf_counter() - start < 20
