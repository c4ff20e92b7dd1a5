from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from medkd.data import demo_slide
from medkd.data.datalists import read_datalist
from medkd.data.streams import Stream, Streams
from medkd.errors import ConfigError, InputError
from medkd.wsi import patches
from medkd.wsi.grid import TileGrid
from medkd.wsi.patches import BalancedTiles, FolderTiles, GridTiles, LabeledGrid, cut_patches, split_slides
from medkd.wsi.slides import Slide
from medkd.wsi.stain import StainJitter
from medkd.wsi.stain_transforms import StainJitterd, StainNormalized

SIZE = 64


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two slides with all their tiles; of the first every third is tumor, every fifth unknown."""
    made = []
    for seed in (0, 1):
        path = demo_slide(tmp_path_factory.mktemp("slides") / f"slide_{seed}.tiff", tiles=4, seed=seed)
        with Slide(path) as slide:
            grid = TileGrid.build(slide, size=SIZE, mpp=4.0, min_tissue=0.0)
        labels = np.zeros(len(grid), np.int64)
        if seed == 0:
            labels[::3] = 1
            labels[::5] = -1
        made.append(LabeledGrid(path, grid, labels, patient=f"p{seed}"))
    return made


def test_items_are_the_slides_own_pixels_at_the_grids_resolution(sources):
    tiles = GridTiles(sources)
    counts = [int((source.labels >= 0).sum()) for source in sources]
    assert len(tiles) == sum(counts)
    assert tiles.labels.min() == 0
    item = tiles[counts[0] + 1]  # of the second slide
    grid = sources[1].grid
    with Slide(sources[1].slide) as slide:
        expected = slide.read(*map(int, grid.coords[1]), (SIZE, SIZE), mpp=4.0)
    assert item["image"].dtype == torch.uint8
    np.testing.assert_array_equal(item["image"].numpy(), np.moveaxis(expected, -1, 0))
    assert (item["patient"], item["slide"], item["label"]) == ("p1", "slide_1", 0)
    assert (item["x"], item["y"]) == tuple(grid.coords[1].tolist())
    assert item["case"] == f"slide_1_x{item['x']}_y{item['y']}"


def test_unlabeled_tiles_are_kept_only_when_asked_for(sources):
    everything = GridTiles(sources, keep_unlabeled=True)
    assert len(everything) == sum(len(source.grid) for source in sources)
    assert "label" not in everything[0]
    unknown = GridTiles([LabeledGrid(sources[0].slide, sources[0].grid)])
    assert len(unknown) == len(sources[0].grid)
    assert "label" not in unknown[0]


def test_a_copy_has_no_handle_and_opens_its_own(sources):
    tiles = GridTiles(sources, cache_mb=1)
    first = tiles[0]["image"]
    assert len(tiles._slides) == 1
    copy = pickle.loads(pickle.dumps(tiles))
    assert not copy._slides
    assert torch.equal(copy[0]["image"], first)
    assert copy._slides[0] is not tiles._slides[0]


def test_a_child_process_drops_the_handles_it_inherits(sources, monkeypatch):
    tiles = GridTiles(sources)
    first = tiles[0]["image"]
    inherited = tiles._slides[0]
    monkeypatch.setattr(patches.os, "getpid", lambda: -1)
    assert torch.equal(tiles[0]["image"], first)
    assert tiles._slides[0] is not inherited


def test_cache_reads_once_and_handles_are_few(sources, monkeypatch):
    monkeypatch.setattr(patches, "_OPEN_SLIDES", 1)
    cached = GridTiles(sources, cache_mb=2 * SIZE * SIZE * 3 / 2**20)
    streamed = GridTiles(sources)
    read = []
    for tiles in (cached, streamed):
        original = tiles._read
        tiles._read = lambda *place, original=original: read.append(place) or original(*place)
        for index in (0, 1, 2, len(tiles) - 1, 0, 1, 2):
            tiles[index]
        assert len(tiles._slides) == 1
    assert len(read) == (3 + 1 + 1) + 7


def test_cached_tile_is_not_changed_by_who_gets_it(sources):
    tiles = GridTiles(sources, cache_mb=1)
    before = tiles[0]["image"].clone()
    tiles[0]["image"].zero_()
    assert torch.equal(tiles[0]["image"], before)


def test_stream_is_the_same_with_any_number_of_workers(sources):
    def images(workers, position=0):
        tiles = GridTiles(sources, transform=StainJitterd("image", prob=0.7))
        source = Stream(BalancedTiles(tiles), 4, num_workers=workers).batches(position, seed=7)
        return [next(source) for _ in range(3)]

    alone, helped, later = images(0), images(2), images(0, position=2)
    for one, other in zip(alone, helped, strict=True):
        assert torch.equal(one["image"], other["image"])
        assert one["case"] == other["case"]
    assert torch.equal(alone[2]["image"], later[0]["image"])


def test_a_grid_of_another_slide_and_unlike_grids_are_refused(sources):
    first, second = sources
    with pytest.raises(InputError, match="slide"):
        GridTiles([LabeledGrid(first.slide, second.grid)])[0]
    with Slide(first.slide) as slide:
        coarse = TileGrid.build(slide, size=SIZE, mpp=8.0, min_tissue=0.0)
    with pytest.raises(ConfigError, match="differ"):
        GridTiles([first, LabeledGrid(first.slide, coarse)])
    with pytest.raises(ConfigError, match="no tile"):
        GridTiles([LabeledGrid(first.slide, first.grid, np.full(len(first.grid), -1))])
    with pytest.raises(InputError, match="labels"):
        LabeledGrid(first.slide, first.grid, np.zeros(3, np.int64))


@pytest.fixture
def folder(tmp_path):
    source = np.random.default_rng(0)
    for name, count in (("normal", 6), ("tumor", 2)):
        (tmp_path / name).mkdir()
        for number in range(count):
            Image.fromarray(source.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(
                tmp_path / name / f"{number}.png"
            )
    return tmp_path


def test_folder_of_classes(folder):
    tiles = FolderTiles.from_folder(folder)
    assert tiles.labels.tolist() == [0] * 6 + [1] * 2
    assert tiles[7]["image"].shape == (3, 16, 16)
    assert tiles[7]["label"] == 1
    assert FolderTiles.from_folder(folder, classes=["tumor", "normal"]).labels.tolist() == [0] * 2 + [1] * 6
    for classes, message in ((["tumour"], "no image"), ([], "no subfolder")):
        with pytest.raises(InputError, match=message):
            FolderTiles.from_folder(folder, classes=classes)
    with pytest.raises(InputError, match="not a folder"):
        FolderTiles.from_folder(folder / "none")


def test_masks_are_read_beside_their_tiles(folder):
    mask = np.zeros((16, 16), np.uint8)
    mask[3:5] = 2
    Image.fromarray(mask).save(folder / "mask.png")
    tile = str(folder / "tumor" / "0.png")
    item = FolderTiles([{"image": tile, "label": str(folder / "mask.png")}], cache_mb=1)[0]
    np.testing.assert_array_equal(item["label"].numpy(), mask[None])
    Image.fromarray(mask[:8]).save(folder / "mask.png")
    with pytest.raises(InputError, match="size"):
        FolderTiles([{"image": tile, "label": str(folder / "mask.png")}])[0]
    with pytest.raises(ConfigError, match="none"):
        FolderTiles([])


def test_rounds_are_balanced_over_classes_then_slides():
    items = [{"image": f"a{n}", "label": 0, "slide": "large"} for n in range(96)]
    items += [{"image": f"b{n}", "label": 0, "slide": "small"} for n in range(4)]
    items += [{"image": f"c{n}", "label": 1, "slide": "large"} for n in range(5)]
    items += [{"image": "unknown", "slide": "large"}]

    class Named(FolderTiles):
        def __getitem__(self, index):
            return self.items[index]

    np.random.seed(0)
    tiles = Named(items)
    by_slide = [BalancedTiles(tiles, length=400)[index] for index in range(400)]
    assert sum(item["label"] for item in by_slide) == 200
    small = sum(item["slide"] == "small" for item in by_slide)
    assert 80 < small < 120
    by_tile = [BalancedTiles(tiles, length=400, by="tile")[index] for index in range(400)]
    assert sum(item["slide"] == "small" for item in by_tile) < 25
    assert len(BalancedTiles(tiles)) == 105
    with pytest.raises(ConfigError, match="balance"):
        BalancedTiles(Named([{"image": "a"}]))


def test_slides_are_split_by_patient_and_class(sources):
    grid = sources[0].grid
    labels = np.zeros(len(grid), np.int64)
    slides = [LabeledGrid(f"/slides/{n}.svs", grid, labels + (n % 4 == 0), patient=f"p{n // 2}") for n in range(24)]
    parts = split_slides(slides, validation=0.25, test=0.25, seed=1)
    owners = {name: {source.patient for source in part} for name, part in parts.items()}
    assert sum(map(len, parts.values())) == 24
    assert not owners["training"] & owners["test"]
    assert not owners["validation"] & (owners["training"] | owners["test"])
    assert [sum(source.labels.max() == 1 for source in parts[name]) for name in ("validation", "test")] in (
        [1, 2], [2, 1], [2, 2],
    )  # fmt: skip
    again = split_slides(slides[::-1], validation=0.25, test=0.25, seed=1)
    assert {s.slide for s in again["test"]} == {s.slide for s in parts["test"]}
    assert len(split_slides(slides, test=0.25, by="slide")["test"]) == 6
    with pytest.raises(InputError, match="twice"):
        split_slides([slides[0], slides[0]], test=0.5)


def test_patch_has_the_class_of_its_center():
    mask = np.zeros((96, 192), np.uint8)
    image = np.zeros((96, 192, 3), np.uint8)
    mask[40:56, 40:56] = 1  # a quarter of the first center of 32: ambiguous
    mask[0:10, 96:] = 1  # only the margin of the second
    assert [(x, label) for x, _, label, _ in cut_patches(image, mask, size=96, center=32)] == [(96, 0)]
    mask[32:56, 32:64] = 1
    found = list(cut_patches(image, mask, size=96, center=32))
    assert [(x, y, label, patch.shape) for x, y, label, patch in found] == [
        (0, 0, 1, (96, 96, 3)), (96, 0, 0, (96, 96, 3)),
    ]  # fmt: skip
    assert len(list(cut_patches(image, 0 * mask, size=96, center=32, step=48))) == 3
    with pytest.raises(ValueError, match="do not fit"):
        list(cut_patches(image, mask[:5], size=96, center=32))


def test_stain_transforms_work_on_channel_first_items():
    image = torch.from_numpy(np.random.default_rng(0).integers(40, 200, (3, 20, 24), dtype=np.uint8))
    jitter = StainJitterd(["image", "other"], prob=1.0).set_random_state(seed=4)
    made = jitter({"image": image, "other": image.numpy()})
    assert made["image"].shape == image.shape
    np.testing.assert_array_equal(made["image"].numpy(), made["other"])
    assert not torch.equal(made["image"], image)
    assert torch.equal(StainJitterd("image", prob=0.0)({"image": image})["image"], image)
    assert torch.equal(StainNormalized("image", lambda pixels: 255 - pixels)({"image": image})["image"], 255 - image)
    assert isinstance(jitter.jitter, StainJitter)


def test_datalist_of_tiles_feeds_the_engines_streams(folder):
    cases = [{"image": str(path.relative_to(folder)), "label": int(path.parent.name == "tumor"), "patient": path.stem}
             for path in sorted(folder.rglob("*.png"))]  # fmt: skip
    import json

    (folder / "datalist.json").write_text(json.dumps({"labels": {"0": "normal", "1": "tumor"}, "training": cases}))
    tiles = FolderTiles(read_datalist(folder / "datalist.json").section("training"), cache_mb=1)
    batch = next(iter(Streams(length_of="labeled", labeled=Stream(BalancedTiles(tiles), 8))))["labeled"]
    assert batch["image"].shape == (8, 3, 16, 16)
    assert batch["label"].dtype == torch.int64
    assert batch["label"].sum() == 4
