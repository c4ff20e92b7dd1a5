from __future__ import annotations

import os
import threading
import tracemalloc

import numpy as np
import openslide
import pytest
import torch
from made_slides import FunctionSlide, blobs, make_grid
from pyramids import damage_tile, tissue_like, write_pyramid
from torch import nn

from medkd.errors import ConfigError, InputError
from medkd.wsi.class_map import NOT_PREDICTED, ClassMap
from medkd.wsi.grid import TileGrid
from medkd.wsi.predict import TileTask, predict_slide, prepare_network
from medkd.wsi.slides import Slide
from medkd.wsi.stitch import Lattice, Stitcher, blending_window

CLASSES = ("normal", "tumor")
LEVELS = {"mean": (0.7, 0.5, 0.6), "std": (0.2, 0.25, 0.2)}
COMMON = {"classes": CLASSES, "amp": False, **LEVELS}


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    )  # fmt: skip
    with torch.no_grad():
        for _ in range(10):
            network(torch.randn(8, 3, 16, 16))
    return network.eval()


@pytest.fixture
def slide() -> FunctionSlide:
    return FunctionSlide(150, 110, blobs)


class Darkness(nn.Module):
    """Segments by the red level of each pixel alone, so that the truth is known without a network."""

    def forward(self, x):
        red = (x[:, :1] * LEVELS["std"][0] + LEVELS["mean"][0]) * 255
        return torch.cat([red - 128, 128 - red], dim=1) / 20


def normalized(pixels):
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (images - torch.tensor(LEVELS["mean"])[:, None, None]) / torch.tensor(LEVELS["std"])[:, None, None]


def test_probabilities_are_those_of_a_plain_loop_over_the_tiles(classifier, slide):
    grid = make_grid(slide)
    prediction = predict_slide(classifier, slide, grid, **COMMON)
    pixels = np.stack([slide.read_region(x, y, (32, 32), mpp=0.5).pixels for x, y in grid.coords])
    with torch.no_grad():
        expected = classifier(normalized(pixels)).softmax(1).numpy()
    assert np.abs(prediction.probabilities - expected).max() < 1e-5
    assert prediction.failed == []
    assert prediction.predicted.all()
    assert (prediction.precision, prediction.device) == ("float32", "cpu")


@pytest.mark.parametrize(("batch_size", "threads"), [(1, 0), (7, 1), (4, 3), (64, 2)])
def test_neither_threads_nor_batches_change_the_result(classifier, slide, batch_size, threads):
    grid = make_grid(slide, overlap=8)
    expected = predict_slide(classifier, slide, grid, **COMMON, threads=0, batch_size=5)
    found = predict_slide(classifier, slide, grid, **COMMON, batch_size=batch_size, threads=threads)
    assert np.abs(found.probabilities - expected.probabilities).max() < 1e-5
    assert np.nanmax(np.abs(found.heatmap.values - expected.heatmap.values)) < 1e-5


def test_a_tile_with_unreadable_pixels_is_failed_and_never_predicted(slide):
    seen = []

    class Counts(nn.Module):
        def forward(self, x):
            if len(x) and x.shape[0] != 1:
                seen.append(len(x))
            return torch.zeros(len(x), 2)

    slide._holes = [(40, 40, 3, 1), (100, 0, 1, 1)]
    grid = make_grid(slide)
    prediction = predict_slide(Counts(), slide, grid, **COMMON, batch_size=5)
    assert [(x, y) for x, y, _ in prediction.failed] == [(96, 0), (32, 32)]
    assert "0.3 %" in prediction.failed[1][2]
    failed = ~prediction.predicted
    assert failed.sum() == 2
    assert np.isnan(prediction.probabilities[failed]).all()
    assert sum(seen) == len(grid) - 2


def test_an_output_that_is_not_finite_is_a_failed_tile():
    slide = FunctionSlide(64, 32, lambda xs, ys: np.repeat(((xs >= 32) * 255)[..., None], 3, axis=-1))

    class Breaks(nn.Module):
        def forward(self, x):
            bright = x.mean((1, 2, 3)) > 0.5
            return torch.where(bright[:, None], torch.nan, torch.zeros(len(x), 2))

    prediction = predict_slide(Breaks(), slide, make_grid(slide), **COMMON)
    assert prediction.failed == [(32, 0, "the network's output is not finite")]
    assert prediction.predicted.tolist() == [True, False]


@pytest.mark.parametrize("overlap", [0, 8, 15])
@pytest.mark.parametrize("shape", [(150, 110), (31, 700), (20, 10)])
def test_a_stitched_segmentation_is_the_segmentation_of_the_whole(overlap, shape):
    slide = FunctionSlide(*shape, blobs)
    grid = make_grid(slide, overlap=overlap)
    prediction = predict_slide(Darkness(), slide, grid, **COMMON, task="segmentation", batch_size=6, heatmap_mpp=2.0)
    whole = slide.read_region(0, 0, shape, mpp=0.5).pixels
    expected = (whole[..., 0] < 128).astype(np.uint8)
    found = prediction.class_map.rows(0, shape[1])
    assert np.array_equal(found, expected)
    assert prediction.heatmap.pixel_level0 == 4
    tumor = torch.softmax(Darkness()(normalized(whole[None])), 1)[0, 1].numpy()
    height, width = shape[1] // 4 * 4, shape[0] // 4 * 4
    means = tumor[:height, :width].reshape(height // 4, 4, width // 4, 4).mean((1, 3))
    assert np.abs(prediction.heatmap.values[1, : height // 4, : width // 4] - means).max() < 1e-5
    prediction.close()


def test_where_no_tile_is_the_maps_say_so():
    slide = FunctionSlide(300, 300, blobs)
    grid = make_grid(slide, keep=lambda x, y: x in (64, 192) and y in (32, 256))
    prediction = predict_slide(Darkness(), slide, grid, **COMMON, task="segmentation")
    class_map = prediction.class_map
    assert (class_map.x, class_map.y, class_map.shape) == (64, 32, (256, 160))
    found = class_map.rows(0, 256)
    known = found != NOT_PREDICTED
    assert known.sum() == 4 * 32 * 32
    assert known[:32, :32].all()
    assert known[224:, 128:].all()
    assert np.isnan(prediction.heatmap.values).any()


def test_tile_edges_do_not_show_when_neighbors_disagree():
    window = blending_window(32, 8)
    total = np.zeros((32 + 24 * 3,) * 2)
    for y in range(4):
        for x in range(4):
            total[24 * y : 24 * y + 32, 24 * x : 24 * x + 32] += window
    assert np.abs(total[8:-8, 8:-8] - 1).max() < 1e-6
    assert window.min() > 0


def test_a_classification_heatmap_has_a_pixel_per_step_and_averages_what_overlaps(classifier):
    slide = FunctionSlide(96, 64, blobs)
    grid = make_grid(slide, size=32, overlap=16)
    prediction = predict_slide(classifier, slide, grid, **COMMON)
    heatmap = prediction.heatmap
    assert heatmap.pixel_level0 == 16
    assert heatmap.values.shape == (2, 4, 6)
    index = {tuple(corner): number for number, corner in enumerate(grid.coords.tolist())}
    covering = [index[x, y] for x in (16, 32) for y in (0, 16)]
    assert np.allclose(heatmap.values[:, 1, 2], prediction.probabilities[covering].mean(0), atol=1e-6)
    assert np.allclose(heatmap.values[:, 0, 0], prediction.probabilities[index[0, 0]], atol=1e-6)


def test_rounded_corners_keep_their_place_on_the_lattice():
    slide = FunctionSlide(100_000, 90_000, blobs, bounds=(1000, 500, 80_000, 70_000))
    step = 256.5130260521042
    numbers = np.array([(3, 1), (300, 1), (4, 2), (250, 270)])
    grid = make_grid(slide, size=512, keep=lambda x, y: x < 2600 and y == 500)
    object.__setattr__(grid, "coords", np.rint((1000, 500) + numbers * step).astype(np.int64))
    object.__setattr__(grid, "size", 128)
    object.__setattr__(grid, "size_level0", step)
    lattice = Lattice.of(grid)
    assert lattice.regular
    assert lattice.x == pytest.approx(1000 + 3 * step, abs=1e-9)
    assert lattice.y == pytest.approx(500 + step, abs=1e-9)
    assert lattice.cells.tolist() == (numbers - (3, 1)).tolist()


def test_one_class_is_present_from_half_on():
    class One(nn.Module):
        def forward(self, x):
            return Darkness()(x)[:, 1:]

    slide = FunctionSlide(64, 64, blobs)
    options = {**COMMON, "classes": ("tumor",), "task": "segmentation", "activation": "sigmoid"}
    prediction = predict_slide(One(), slide, make_grid(slide), **options)
    whole = slide.read_region(0, 0, (64, 64), mpp=0.5).pixels
    assert np.array_equal(prediction.class_map.rows(0, 64) == 0, whole[..., 0] < 128)
    assert prediction.reported_classes == (0,)


def test_without_tiles_there_is_an_empty_result(classifier, slide):
    grid = make_grid(slide, keep=lambda x, y: False)
    for task in ("classification", "segmentation"):
        prediction = predict_slide(classifier, slide, grid, **COMMON, task=task)
        assert prediction.probabilities.shape == (0, 2)
        assert prediction.heatmap is None
        assert prediction.class_map is None


def test_a_grid_of_another_slide_is_refused(classifier, slide):
    grid = make_grid(slide)
    slide.fingerprint = "0" * 64
    with pytest.raises(InputError, match="another slide"):
        predict_slide(classifier, slide, grid, **COMMON)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"classes": ("a", "b", "c")}, "network: gives .* needs"),
        ({"task": "segmentation"}, "network: gives .* a segmentation with 2 classes needs"),
        ({"classes": ("one",)}, "softmax over one class"),
        ({"classes": ("a", "a")}, "classes"),
        ({"std": (0.1, 0.0, 0.1)}, "std"),
        ({"mean": (0.1, 0.1)}, "three values"),
        ({"amp": "fp8"}, "not a precision"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_what_does_not_fit_is_refused(classifier, slide, changed, message):
    with pytest.raises(ConfigError, match=message):
        predict_slide(classifier, slide, make_grid(slide), **{**COMMON, **changed})


def test_a_network_that_gives_no_tensor_or_cannot_run_is_refused(slide):
    class Pair(nn.Module):
        def forward(self, x):
            return x.mean((2, 3)), x

    with pytest.raises(ConfigError, match="gives a tuple"):
        predict_slide(Pair(), slide, make_grid(slide), **COMMON)
    with pytest.raises(ConfigError, match="cannot run on tiles of 32 px"):
        predict_slide(nn.Sequential(nn.Flatten(), nn.Linear(7, 2)), slide, make_grid(slide), **COMMON)


def test_a_network_prepared_once_serves_many_slides(classifier, slide):
    task = TileTask(task="classification", size=32, mpp=0.5, classes=CLASSES, **LEVELS)
    prepared = prepare_network(classifier, task, amp="bf16")
    for grid in (make_grid(slide), make_grid(slide, overlap=8)):
        found = predict_slide(prepared, slide, grid, **COMMON)
        assert found.precision == "bfloat16"
        expected = predict_slide(classifier, slide, grid, **{**COMMON, "amp": "bf16"})
        assert np.array_equal(found.probabilities, expected.probabilities)
    with pytest.raises(ConfigError, match="prepared with"):
        predict_slide(prepared, slide, make_grid(slide), **{**COMMON, "mean": (0.1, 0.1, 0.1)})


def test_a_task_names_the_value_that_cannot_be_right():
    good = {"task": "classification", "size": 96, "mpp": 0.5, "classes": CLASSES, **LEVELS}
    assert TileTask(**good).overlap == 0
    for name, value in {"size": 0, "mpp": float("nan"), "overlap": 96, "task": "x", "activation": "relu"}.items():
        with pytest.raises(ConfigError, match=name):
            TileTask(**{**good, name: value})


def test_bf16_stays_close_and_says_so(classifier, slide):
    grid = make_grid(slide)
    exact = predict_slide(classifier, slide, grid, **COMMON)
    low = predict_slide(classifier, slide, grid, **{**COMMON, "amp": "bf16"})
    assert low.precision == "bfloat16"
    assert np.abs(low.probabilities - exact.probabilities).max() < 0.02


def test_an_exception_while_predicting_leaves_no_thread(classifier, slide):
    class Stopped(BaseException):
        pass

    calls = []

    def progress(done, total):
        calls.append((done, total))
        raise Stopped

    before = threading.active_count()
    with pytest.raises(Stopped):
        predict_slide(classifier, slide, make_grid(slide), **COMMON, batch_size=2, threads=3, progress=progress)
    assert calls == [(2, 20)]
    assert threading.active_count() == before


def test_a_reader_error_is_raised_where_the_caller_is(classifier, slide):
    class Vanished(FunctionSlide):
        def read_region(self, x, y, size, *, mpp):
            raise InputError(self.path, "is gone", "look for it")

    gone = Vanished(150, 110, blobs)
    for threads in (0, 2):
        with pytest.raises(InputError, match="is gone"):
            predict_slide(classifier, gone, make_grid(gone), **COMMON, threads=threads)


def test_memory_does_not_grow_with_the_height_of_a_segmented_slide():
    def peak(height):
        slide = FunctionSlide(512, height, lambda xs, ys: np.zeros((*xs.shape, 3), np.uint8) + 50)
        grid = make_grid(slide, size=256)
        tracemalloc.start()
        prediction = predict_slide(Darkness(), slide, grid, **COMMON, task="segmentation", batch_size=2, threads=1)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert prediction.class_map.rows(height - 1, height).max() == 1
        prediction.close()
        return most

    short, tall = peak(2048), peak(16384)
    assert tall < short + 3e6  # the class map alone grows by 7 MB


def test_a_class_map_costs_disk_only_where_it_is_written():
    class_map = ClassMap(100_000, 100_000, x=0, y=0, pixel_level0=1)
    rows = np.full((2, 100_000), NOT_PREDICTED, np.uint8)
    rows[:, 7] = 3
    class_map.write_rows(50_000, rows)
    found = class_map.rows(49_999, 50_003)
    assert found[:, 7].tolist() == [NOT_PREDICTED, 3, 3, NOT_PREDICTED]
    assert os.fstat(class_map._file.fileno()).st_blocks * 512 < 1_000_000
    class_map.close()


def test_too_many_classes_for_a_class_map_are_refused():
    with pytest.raises(ValueError, match="254"):
        Stitcher(8, 8, n_classes=255, size=8, overlap=0, x=0, y=0, pixel_level0=1, heatmap_factor=1)


def test_a_damaged_tile_in_a_real_file_fails_the_tiles_it_touches_and_no_others(classifier, tmp_path):
    path = tmp_path / "slide.tiff"
    write_pyramid(path, tissue_like(600, 500), tile=128)
    with Slide(path) as slide:
        grid = TileGrid.build(slide, size=96, mpp=0.5, min_tissue=0)
        whole = predict_slide(classifier, slide, grid, **COMMON)
    left, top = damage_tile(path, "garbage", column=2, row=1)
    with Slide(path) as slide:
        grid = TileGrid.build(slide, size=96, mpp=0.5, min_tissue=0)
        found = predict_slide(classifier, slide, grid, **COMMON, threads=3, batch_size=4)
        assert len(slide.bad_tiles) == 1
    touched = [x < left + 128 and x + 96 > left and y < top + 128 and y + 96 > top for x, y in grid.coords.tolist()]
    assert found.predicted.tolist() == [not value for value in touched]
    assert np.abs(found.probabilities - whole.probabilities)[found.predicted].max() < 1e-5
    assert len(found.failed) == sum(touched) > 0


def test_a_real_slide_gives_what_openslide_and_the_plain_network_give(classifier, real_data):
    path = real_data / "slides" / "cmu_small_region.svs"
    with Slide(path) as slide:
        grid = TileGrid.build(slide, size=256, mpp=slide.mpp)
        found = predict_slide(classifier, slide, grid, **COMMON)
    with openslide.OpenSlide(path) as opened:
        tiles = [opened.read_region((int(x), int(y)), 0, (256, 256)).convert("RGB") for x, y in grid.coords[:20]]
    with torch.no_grad():
        expected = classifier(normalized(np.stack([np.asarray(tile) for tile in tiles]))).softmax(1).numpy()
    assert np.abs(found.probabilities[:20] - expected).max() < 2e-3  # two JPEG decoders
    assert found.failed == []
