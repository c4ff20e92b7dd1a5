"""``medkd train`` on the bundle that classifies tiles: the run's bundle is ready for slides."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bundles"))

from bundle_copies import BUNDLES, CLASSIFIER, QUICK, write_tiles

from medkd.data import demo_slide
from medkd.deploy.bundle import load_bundle
from medkd.deploy.slide_bundle import slide_task
from medkd.errors import InputError
from medkd.workflows.train import train
from medkd.wsi import Slide, TileGrid, predict_slide

pytestmark = pytest.mark.filterwarnings("ignore")


def quick(folder: Path) -> dict[str, object]:
    overrides = {key.replace("#", "::"): value for key, value in QUICK[CLASSIFIER].items()}
    return {**overrides, "dataset_dir": str(folder), "datalist": str(folder / "datalist.json")}


def test_trained_run_has_a_bundle_for_slides_and_a_report(tmp_path):
    write_tiles(tmp_path)
    run = train(BUNDLES / CLASSIFIER, quick(tmp_path), run_dir=tmp_path / "run", device="cpu")
    assert "val_auc" in (run / "metrics.csv").read_text()
    assert (run / "report.html").is_file()
    bundle = load_bundle(run)
    assert bundle.metadata["network_data_format"]["outputs"]["pred"]["channel_def"] == {"0": "normal", "1": "tumor"}
    task = slide_task(bundle)
    assert task == slide_task(load_bundle(BUNDLES / CLASSIFIER))
    assert "medkd slide predict" in (run / "bundle" / "docs" / "README.md").read_text()
    with Slide(demo_slide(tmp_path / "demo.tiff", tiles=4)) as slide:
        grid = TileGrid.build(slide, size=task.size, mpp=task.mpp)
        prediction = predict_slide(
            bundle.network, slide, grid, classes=task.classes, task=task.task, mean=task.mean, std=task.std
        )
    assert prediction.probabilities.shape == (len(grid), 2)


def test_damaged_tile_stops_a_training_before_it_starts(tmp_path):
    write_tiles(tmp_path)
    (tmp_path / "images" / "training_1.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(InputError, match=r"training_1\.png"):
        train(BUNDLES / CLASSIFIER, quick(tmp_path), run_dir=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
