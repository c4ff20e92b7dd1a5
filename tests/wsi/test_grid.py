"""Tiles lie where they are said to lie, hold as much tissue as they are said to, and survive the file."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
from array_slide import ArraySlide, glass
from hypothesis import given, settings
from hypothesis import strategies as st

from medkd import __version__
from medkd.errors import ConfigError, InputError
from medkd.wsi.grid import TileGrid, area_fractions, read_tile_labels
from medkd.wsi.tissue import TissueMask


class Outline:
    """A slide of which only the outline matters."""

    def __init__(self, width=1000, height=700, *, mpp=0.5, bounds=None, levels=(1.0,)):
        self.dimensions, self.mpp, self.level_downsamples = (width, height), mpp, levels
        self.bounds = bounds or (0, 0, width, height)
        self.name, self.path, self.fingerprint = "outline", "outline.tiff", "ab" * 32


def whole(slide, **options):
    return TileGrid.build(slide, **({"size": 64, "mpp": 0.5, "min_tissue": 0} | options))


outlines = st.builds(
    Outline, st.integers(1, 3000), st.integers(1, 3000), mpp=st.floats(0.1, 2), bounds=st.none()
)  # fmt: skip


class TestLayout:
    @settings(max_examples=60)
    @given(outlines, st.integers(8, 300), st.floats(0.1, 4), st.floats(0, 0.9), st.sampled_from(["pad", "drop"]))
    def test_every_origin_is_the_true_one_rounded_once(self, slide, size, mpp, share, border):
        grid = whole(slide, size=size, mpp=max(mpp, slide.mpp / 4), overlap=int(size * share), border=border)
        step = (grid.size - grid.overlap) * grid.mpp / slide.mpp
        for axis in (0, 1):
            origins = np.unique(grid.coords[:, axis])
            assert np.abs(origins - np.arange(len(origins)) * step).max(initial=0) <= 0.5 + 1e-9

    @settings(max_examples=60)
    @given(outlines, st.integers(8, 300), st.floats(0.5, 4), st.floats(0, 0.9))
    def test_padded_tiles_cover_the_slide_and_none_is_needless(self, slide, size, mpp, share):
        grid = whole(slide, size=size, mpp=mpp, overlap=int(size * share))
        for axis, length in enumerate(slide.dimensions):
            origins = np.unique(grid.coords[:, axis])
            assert origins[-1] + grid.size_level0 >= length - 1
            if len(origins) > 1:
                assert origins[-2] + grid.size_level0 < length + 1

    @settings(max_examples=60)
    @given(outlines, st.integers(8, 300), st.floats(0.5, 4))
    def test_dropped_borders_leave_only_tiles_inside(self, slide, size, mpp):
        grid = whole(slide, size=size, mpp=mpp, border="drop")
        assert (grid.coords + grid.size_level0 <= np.asarray(slide.dimensions) + 1).all()

    def test_tiles_that_fit_exactly_need_no_padding(self):
        slide = Outline(640, 320)
        assert np.array_equal(whole(slide).coords, whole(slide, border="drop").coords)
        assert len(whole(slide)) == 50

    def test_tiles_are_listed_row_by_row(self):
        assert whole(Outline(128, 128)).coords.tolist() == [[0, 0], [64, 0], [0, 64], [64, 64]]

    def test_the_grid_covers_the_bounds_only(self):
        grid = whole(Outline(5000, 5000, bounds=(1000, 2000, 128, 64)))
        assert grid.coords.tolist() == [[1000, 2000], [1064, 2000]]

    def test_size_is_in_pixels_of_the_network(self):
        grid = whole(Outline(mpp=0.25), size=100, mpp=1.0)
        assert grid.size_level0 == 400
        assert grid.centers[0].tolist() == [200, 200]

    def test_a_slide_smaller_than_a_tile_has_one(self):
        assert len(whole(Outline(10, 10))) == 1
        assert len(whole(Outline(10, 10), border="drop")) == 0

    @pytest.mark.parametrize(
        "options",
        [
            {"size": 0},
            {"mpp": 0},
            {"mpp": float("nan")},
            {"overlap": 64},
            {"overlap": -1},
            {"min_tissue": 1.1},
            {"min_tissue": float("nan")},
            {"border": "wrap"},
        ],
    )
    def test_parameters_that_make_no_grid_are_refused(self, options):
        with pytest.raises(ConfigError):
            whole(Outline(), **options)


class TestTissue:
    @settings(max_examples=60)
    @given(st.integers(0, 10_000), st.floats(0.5, 20), st.floats(1, 80))
    def test_fractions_are_exact_areas(self, seed, downsample, size):
        rng = np.random.default_rng(seed)
        mask = rng.random((9, 12)) < 0.5
        x, y = rng.uniform(-5, 12 * downsample, 4), rng.uniform(-5, 9 * downsample, 3)

        def overlap(starts, count):
            edges = np.arange(count) * downsample
            low, high = np.maximum(starts[:, None], edges), np.minimum(starts[:, None] + size, edges + downsample)
            return np.maximum(high - low, 0)

        expected = overlap(y, 9) @ mask @ overlap(x, 12).T / size**2
        found = area_fractions(mask, downsample, x, y, size).reshape(3, 4)
        assert np.allclose(found, expected, atol=1e-5)

    def test_the_tissue_of_all_tiles_adds_up(self):
        slide = Outline(1000, 700)
        mask = np.random.default_rng(0).random((88, 125)) < 0.3
        tissue = TissueMask(mask, 4.0, 8.0)
        grid = whole(slide, size=48, mpp=0.7, tissue=tissue)
        assert (grid.tissue_fraction.sum() * grid.size_level0**2) == pytest.approx(mask.sum() * 64, rel=0.01)

    def test_tiles_with_less_tissue_are_left_out(self):
        mask = np.zeros((70, 100), bool)
        mask[:, :48] = True
        tissue = TissueMask(mask, 5.0, 10.0)
        grid = whole(Outline(), size=64, tissue=tissue, min_tissue=0.5)
        assert grid.coords[:, 0].max() == 448, "the tile from 448 on is exactly half full"
        assert (grid.tissue_fraction >= 0.5).all()
        assert len(whole(Outline(), tissue=tissue, min_tissue=0)) > len(grid)

    def test_a_tile_full_of_tissue_passes_the_strictest_limit(self):
        tissue = TissueMask(np.ones((71, 101), bool), 5.0, 10.0)
        assert len(whole(Outline(), tissue=tissue, min_tissue=1, mpp=0.37, border="drop")) > 0

    def test_what_lies_off_the_slide_is_no_tissue(self):
        tissue = TissueMask(np.ones((70, 100), bool), 5.0, 10.0)
        assert whole(Outline(), size=1000, tissue=tissue).tissue_fraction.tolist() == [pytest.approx(0.7)]

    def test_tissue_is_found_when_needed_and_only_then(self):
        blank = ArraySlide(glass(300, 400))
        assert len(TileGrid.build(blank, size=64, mpp=0.5)) == 0
        grid = TileGrid.build(blank, size=64, mpp=0.5, min_tissue=0)
        assert len(grid) == 35
        assert np.isnan(grid.tissue_fraction).all()


class TestFile:
    @pytest.fixture
    def grid(self):
        tissue = TissueMask(np.random.default_rng(0).random((70, 100)) < 0.6, 5.0, 10.0)
        return whole(Outline(levels=(1.0, 4.004)), size=32, mpp=2.0, overlap=4, tissue=tissue)

    def test_a_saved_grid_is_loaded_as_it_was(self, grid, tmp_path):
        grid.save(tmp_path / "a.h5")
        again = TileGrid.load(tmp_path / "a.h5")
        for name in TileGrid.__dataclass_fields__:
            assert np.array_equal(getattr(again, name), getattr(grid, name)), name
        assert again.coords.dtype == np.int64
        assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]

    def test_an_empty_grid_is_saved_and_loaded(self, tmp_path):
        grid = whole(Outline(), tissue=TissueMask(np.zeros((70, 100), bool), 5.0, 10.0), min_tissue=0.1)
        grid.save(tmp_path / "a.h5", labels=np.zeros(0, np.int64), classes=["a"])
        assert TileGrid.load(tmp_path / "a.h5").coords.shape == (0, 2)
        assert read_tile_labels(tmp_path / "a.h5")[1] == ["a"]

    def test_trident_computes_the_same_tiles_from_it(self, grid, tmp_path):
        grid.save(tmp_path / "a.h5")
        with h5py.File(tmp_path / "a.h5") as file:
            said = dict(file["coords"].attrs)
            assert file["coords"].shape == (len(grid), 2)
        downsample = (10 / said["target_magnification"]) / (10 / said["level0_magnification"])
        assert said["patch_size"] * downsample == pytest.approx(grid.size_level0)
        assert said["patch_size_level0"] == round(grid.size_level0)
        assert (said["overlap"], said["name"]) == (4, "outline")
        assert (said["level0_width"], said["level0_height"]) == grid.dimensions

    def test_clam_reads_the_right_level_or_none(self, grid, tmp_path):
        grid.save(tmp_path / "a.h5")
        with h5py.File(tmp_path / "a.h5") as file:
            said = dict(file["coords"].attrs)
        assert (said["patch_level"], said["patch_size"]) == (1, 32)
        whole(Outline(levels=(1.0, 4.0)), mpp=1.0).save(tmp_path / "b.h5")
        with h5py.File(tmp_path / "b.h5") as file:
            assert "patch_level" not in file["coords"].attrs, "no level has 1 µm per pixel"

    def test_microns_fingerprint_and_version_are_said(self, grid, tmp_path):
        grid.save(tmp_path / "a.h5")
        with h5py.File(tmp_path / "a.h5") as file:
            said = dict(file["coords"].attrs)
        assert (said["mpp"], said["slide_mpp"], said["slide_fingerprint"]) == (2.0, 0.5, "ab" * 32)
        assert said["medkd_version"] == __version__

    def test_labels_are_kept_beside_the_tiles(self, grid, tmp_path):
        labels = np.arange(len(grid)) % 3 - 1
        grid.save(tmp_path / "a.h5", labels=labels, classes=["normal", "tumor"])
        found, classes = read_tile_labels(tmp_path / "a.h5")
        assert np.array_equal(found, labels)
        assert classes == ["normal", "tumor"]
        grid.save(tmp_path / "a.h5")
        with pytest.raises(InputError, match="without labels"):
            read_tile_labels(tmp_path / "a.h5")

    def test_damage_is_refused_or_without_effect(self, grid, tmp_path):
        grid.save(tmp_path / "a.h5", labels=np.zeros(len(grid), np.int64), classes=["a"])
        content = (tmp_path / "a.h5").read_bytes()
        rng = np.random.default_rng(0)
        damaged = [content[:length] for length in (0, 1, 100, len(content) // 2, len(content) - 8)]
        for place in [*rng.integers(0, len(content), 60), *rng.integers(0, 4000, 200)]:
            damaged.append(content[:place] + bytes([content[place] ^ 1 << rng.integers(8)]) + content[place + 1 :])
        for bad in damaged:
            (tmp_path / "bad.h5").write_bytes(bad)
            try:
                found = TileGrid.load(tmp_path / "bad.h5")
            except InputError:
                continue
            for name in TileGrid.__dataclass_fields__:
                assert np.array_equal(getattr(found, name), getattr(grid, name)), name

    def test_files_of_others_are_refused(self, tmp_path):
        with h5py.File(tmp_path / "clam.h5", "w") as file:
            file.create_dataset("coords", data=np.zeros((3, 2), np.int64)).attrs["patch_size"] = 256
        with pytest.raises(InputError, match="does not say for which slide"):
            TileGrid.load(tmp_path / "clam.h5")
        with h5py.File(tmp_path / "empty.h5", "w"):
            pass
        with pytest.raises(InputError, match="cannot be read"):
            TileGrid.load(tmp_path / "empty.h5")
        with pytest.raises(InputError, match="does not exist"):
            TileGrid.load(tmp_path / "none.h5")

    def test_a_failed_write_leaves_the_old_file(self, grid, tmp_path, monkeypatch):
        grid.save(tmp_path / "a.h5")
        before = (tmp_path / "a.h5").read_bytes()

        def full(*_):
            raise OSError("no space left on device")

        monkeypatch.setattr("os.replace", full)
        with pytest.raises(OSError, match="no space"):
            grid.save(tmp_path / "a.h5", labels=np.zeros(len(grid), np.int64), classes=["a"])
        assert (tmp_path / "a.h5").read_bytes() == before
        assert len(list(tmp_path.iterdir())) == 1


class TestSlideOfAGrid:
    def test_its_own_slide_is_accepted(self):
        whole(Outline()).require_slide(Outline())

    def test_another_slide_is_refused(self):
        other = Outline()
        other.fingerprint = "cd" * 32
        with pytest.raises(InputError, match="another slide"):
            whole(Outline()).require_slide(other)

    def test_another_resolution_of_the_same_slide_is_refused(self):
        with pytest.raises(InputError, match=r"0\.5.*0\.25"):
            whole(Outline()).require_slide(Outline(mpp=0.25))
