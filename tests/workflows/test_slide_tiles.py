"""``slide tile`` from end to end, on the embedded slide."""

from __future__ import annotations

import csv
import json
import shutil

import cv2
import numpy as np
import pytest

from medkd.data.datalists import read_datalist
from medkd.data.slide_demo import demo_slide
from medkd.errors import ConfigError, InputError
from medkd.workflows.slide_tiles import find_classes, join_datalists, tile_slide
from medkd.wsi.annotations import read_annotations, write_annotations
from medkd.wsi.grid import TileGrid, read_tile_labels
from medkd.wsi.slides import Region, Slide
from medkd.wsi.tissue import find_tissue


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory):
    return demo_slide(tmp_path_factory.mktemp("slides"), tiles=6)


@pytest.fixture(scope="module")
def drawn(slide_path):
    """The largest island, as an annotation of class "tumor", with a hole, and a small one inside it."""
    path = slide_path.parent / "drawn.geojson"
    island = max(read_annotations(slide_path.parent / "demo_slide_tissue.geojson"), key=lambda region: region.area)
    center = island.polygons[0][0].mean(0)
    ring = center + np.array([[-40, -40], [40, -40], [40, 40], [-40, 40]])
    regions = [type(island)("tumor", ((island.polygons[0][0], ring),)), type(island)("necrosis", ((ring,),))]
    write_annotations(path, regions)
    return path


def tile(slide, out, **options):
    return tile_slide(slide, out, **({"size": 64, "mpp": 0.5} | options))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_grid_picture_and_tissue_are_written(slide_path, tmp_path):
    result = tile(slide_path, tmp_path / "new" / "out")
    assert (result.name, result.status) == ("demo_slide", "done")
    assert names(tmp_path / "new" / "out") == ["demo_slide.h5", "demo_slide_overview.png", "demo_slide_tissue.geojson"]
    assert sorted(path.name for path in result.files) == names(tmp_path / "new" / "out")
    grid = TileGrid.load(result.files[0])
    with Slide(slide_path) as slide:
        grid.require_slide(slide)
        expected = TileGrid.build(slide, size=64, mpp=0.5)
    assert len(grid) == result.n_tiles > 20
    assert np.array_equal(grid.coords, expected.coords)
    picture = cv2.imread(str(result.files[1]))
    assert picture.shape[1] == 1600
    assert picture[100:1500, 100:1500].std() > 20, "there is something on it"


def test_corrected_tissue_is_used_instead_of_the_found(slide_path, tmp_path):
    first = tile(slide_path, tmp_path / "a")
    again = tile(slide_path, tmp_path / "b", tissue=tmp_path / "a" / "demo_slide_tissue.geojson")
    one, other = (TileGrid.load(result.files[0]) for result in (first, again))
    assert np.array_equal(one.coords, other.coords)
    assert np.array_equal(one.tissue_fraction, other.tissue_fraction)
    content = json.loads((tmp_path / "a" / "demo_slide_tissue.geojson").read_text())
    content["features"] = content["features"][:1]
    (tmp_path / "less.geojson").write_text(json.dumps(content))
    assert tile(slide_path, tmp_path / "c", tissue=tmp_path / "less.geojson").n_tiles < first.n_tiles


def test_saved_images_are_the_slides_pixels(slide_path, tmp_path):
    seen = []
    options = {"mpp": 1.1, "overlap": 8, "save_images": True, "threads": 3}
    result = tile(slide_path, tmp_path, **options, progress=lambda *now: seen.append(now))
    grid = TileGrid.load(result.files[0])
    folder = tmp_path / "demo_slide_tiles"
    assert names(folder) == sorted(f"demo_slide_x{x}_y{y}.png" for x, y in grid.coords)
    with Slide(slide_path) as slide:
        for x, y in grid.coords[:: len(grid) // 5].tolist():
            image = cv2.imread(str(folder / f"demo_slide_x{x}_y{y}.png"))[..., ::-1]
            assert np.array_equal(image, slide.read(x, y, (64, 64), mpp=1.1))
    assert seen[-1] == (len(grid), len(grid))
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_a_blank_slide_is_a_success_without_tiles(tmp_path, drawn):
    blank = tmp_path / "blank.tiff"
    _write_blank(blank)
    result = tile(blank, tmp_path / "out", save_images=True, annotations=drawn, slide_mpp=0.5)
    assert (result.status, result.n_tiles, result.failed_tiles) == ("empty-tissue", 0, ())
    assert len(TileGrid.load(result.files[0])) == 0
    assert result.label_counts == {"background": 0, "necrosis": 0, "tumor": 0}
    assert {"blank.h5", "blank_overview.png"} <= set(names(tmp_path / "out"))
    assert join_datalists(tmp_path / "out", ["blank"]) is None


def _write_blank(path):
    import tifffile

    pixels = np.full((600, 700, 3), 243, np.uint8)
    tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb")


class TestLabels:
    def test_every_tile_gets_its_class(self, slide_path, drawn, tmp_path):
        result = tile(slide_path, tmp_path, annotations=drawn)
        labels, classes = read_tile_labels(result.files[0])
        assert classes == ["background", "necrosis", "tumor"]
        assert result.label_counts == {name: int((labels == k).sum()) for k, name in enumerate(classes)}
        assert min(result.label_counts.values()) > 0
        with (tmp_path / "demo_slide_labels.csv").open() as file:
            rows = list(csv.DictReader(file))
        grid = TileGrid.load(result.files[0])
        assert [(int(row["x"]), int(row["y"])) for row in rows] == [tuple(xy) for xy in grid.coords.tolist()]
        assert [row["class"] for row in rows] == [classes[label] for label in labels]
        assert not (tmp_path / "demo_slide_datalist.json").exists()

    def test_the_datalist_of_images_can_be_trained_on(self, slide_path, drawn, tmp_path):
        result = tile(slide_path, tmp_path, annotations=drawn, save_images=True, patient="p1", min_tissue=0.8)
        datalist = read_datalist(tmp_path / "demo_slide_datalist.json")
        assert datalist.label_names == {0: "background", 1: "necrosis", 2: "tumor"}
        items = datalist.section("training")
        assert len(items) == result.n_tiles
        labels, _ = read_tile_labels(result.files[0])
        assert [item["label"] for item in items] == labels.tolist()
        assert {item["patient"] for item in items} == {"p1"}
        assert {"slide", "x", "y", "mpp", "class"} <= items[0].keys()

    def test_ambiguous_tiles_are_unlabeled(self, slide_path, drawn, tmp_path):
        result = tile(slide_path, tmp_path, annotations=drawn, save_images=True, rule="fraction", min_fraction=0.9)
        datalist = read_datalist(tmp_path / "demo_slide_datalist.json")
        labels, _ = read_tile_labels(result.files[0])
        assert len(datalist.unlabeled) == (labels < 0).sum() > 0
        assert len(datalist.training) == (labels >= 0).sum()

    def test_masks_hold_the_class_of_every_pixel(self, slide_path, drawn, tmp_path):
        tile(slide_path, tmp_path, annotations=drawn, save_images=True, masks=True, mpp=1.0)
        items = read_datalist(tmp_path / "demo_slide_datalist.json").section("training")
        seen = set()
        for item in items:
            mask = cv2.imread(item["label"], cv2.IMREAD_UNCHANGED)
            assert mask.shape == (64, 64)
            seen |= set(np.unique(mask).tolist())
        assert seen == {0, 1, 2}

    def test_slides_are_joined_when_they_share_their_classes(self, slide_path, drawn, tmp_path):
        only_tumor = tmp_path / "tumor.geojson"
        write_annotations(only_tumor, [region for region in read_annotations(drawn) if region.name == "tumor"])
        classes = find_classes([drawn, only_tumor])
        assert classes == ("background", "necrosis", "tumor")
        out = tmp_path / "out"
        for name, file in (("a", drawn), ("b", only_tumor)):
            tile(slide_path, out, annotations=file, classes=classes, save_images=True, name=name, mpp=1.0)
        joined = read_datalist(join_datalists(out, ["a", "b", "c"]))
        assert {case.patient for case in joined.training} == {"a", "b"}
        shutil.rmtree(out)
        for name, file in (("a", drawn), ("b", only_tumor)):
            tile(slide_path, out, annotations=file, save_images=True, name=name, mpp=1.0)
        with pytest.raises(InputError, match="same classes"):
            join_datalists(out, ["a", "b"])

    def test_classes_may_be_ignored_or_named_by_the_user(self, slide_path, drawn, tmp_path):
        options = {"annotations": drawn, "classes": ("normal", "tumor"), "outside": "normal"}
        assert set(tile(slide_path, tmp_path, **options).label_counts) == {"normal", "tumor"}


class TestTrouble:
    def test_bad_annotations_write_nothing(self, slide_path, tmp_path):
        (tmp_path / "bad.geojson").write_text('[{"type": "Feature", "geometry": null}]')
        with pytest.raises(InputError, match=r"bad\.geojson: feature 1"):
            tile(slide_path, tmp_path / "out", annotations=tmp_path / "bad.geojson")
        assert not (tmp_path / "out").exists()

    def test_another_name_keeps_the_slides_own_out_of_every_output(self, slide_path, drawn, tmp_path):
        secret = tmp_path / "DOE_JANE_19700101.tiff"
        shutil.copy(slide_path, secret)
        out = tmp_path / "out"
        tile(secret, out, name="slide-0001", annotations=drawn, save_images=True, mpp=1.0)
        for path in out.rglob("*"):
            assert "DOE" not in path.name
            assert path.is_dir() or b"DOE" not in path.read_bytes(), path.name

    def test_a_tile_that_cannot_be_read_has_no_image_and_is_told(self, slide_path, tmp_path, drawn, monkeypatch):
        with Slide(slide_path) as slide:
            tissue = find_tissue(slide)
            bad = TileGrid.build(slide, size=64, mpp=0.5, tissue=tissue).coords[3].tolist()
        read = Slide.read_region

        def broken(self, x, y, size, *, mpp):
            region = read(self, x, y, size, mpp=mpp)
            return Region(region.pixels, np.zeros(size, bool)) if [x, y] == bad else region

        monkeypatch.setattr(Slide, "read_region", broken)
        result = tile(slide_path, tmp_path, save_images=True, annotations=drawn)
        assert [list(place) for place in result.failed_tiles] == [bad]
        assert len(names(tmp_path / "demo_slide_tiles")) == result.n_tiles - 1
        assert len(read_datalist(tmp_path / "demo_slide_datalist.json").training) == result.n_tiles - 1

    def test_a_failure_halfway_leaves_no_half_folder(self, slide_path, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("medkd.workflows.slide_tiles._write_png", full)
        with pytest.raises(OSError, match="No space"):
            tile(slide_path, tmp_path, save_images=True)
        assert not [name for name in names(tmp_path) if "tiles" in name]

    def test_repeating_replaces_what_was_there(self, slide_path, tmp_path):
        tile(slide_path, tmp_path, save_images=True)
        (tmp_path / "demo_slide_tiles" / "old.png").write_bytes(b"")
        tile(slide_path, tmp_path, save_images=True, mpp=1.0)
        assert "old.png" not in names(tmp_path / "demo_slide_tiles")

    @pytest.mark.parametrize("options", [{"masks": True}, {"size": 0}, {"mpp": -1}])
    def test_senseless_options_are_refused(self, slide_path, tmp_path, options):
        with pytest.raises(ConfigError):
            tile(slide_path, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
