from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import simplejpeg

from medkd.data.jpeg_tiff import JpegLevel, write_jpeg_tiff

SIDE, TILE, BAND = 100_000, 256, 2048  # pixels; tissue is a cross of two bands over the whole slide

CHILD = """
import json, resource, sys
import torch
from torch import nn
torch.set_num_threads(1)
from medkd.engine import trainer
from medkd.wsi.slides import Slide
from medkd.wsi.grid import TileGrid
from medkd.wsi.predict import predict_slide
from medkd.wsi.export import write_prediction

def megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
start = megabytes()
with Slide(sys.argv[1]) as slide:
    grid = TileGrid.build(slide, size=256, mpp=0.5, overlap=32, min_tissue=0.5)
    prediction = predict_slide(network, slide, grid, classes=("normal", "tumor"), mean=(0.5,) * 3, std=(0.2,) * 3,
                               task="segmentation", batch_size=8, threads=2)
    files = write_prediction(prediction, slide, sys.argv[2])
print(json.dumps({"before": start, "peak": megabytes(), "tiles": len(grid), "failed": len(prediction.failed),
                  "map": prediction.class_map.shape, "seconds": prediction.seconds["total"]}))
"""


def levels():
    """A pyramid whose tiles are few different ones, stored once each."""
    random = np.random.default_rng(0)
    tissue = np.clip(random.normal((170, 90, 160), 30, (TILE, TILE, 3)), 0, 255).astype(np.uint8)
    blank = simplejpeg.encode_jpeg(np.full((TILE, TILE, 3), 242, np.uint8), quality=80)
    stained = simplejpeg.encode_jpeg(tissue, quality=80)
    for downsample in (1, 4, 16, 64):
        side = -(-SIDE // downsample)
        across = -(-side // TILE)
        middle, half = side / 2, BAND / downsample / 2

        def band(number, middle=middle, half=half):
            return number * TILE < middle + half and (number + 1) * TILE > middle - half

        yield JpegLevel(
            width=side,
            height=side,
            tiles=(
                stained if band(row) or band(column) else blank for row in range(across) for column in range(across)
            ),
            tile=(TILE, TILE),
            mpp=(0.25 * downsample, 0.25 * downsample),
        )


@pytest.mark.slow
def test_a_sparse_slide_of_100k_by_100k_takes_less_than_2_gb(tmp_path):
    slide = tmp_path / "sparse.tiff"
    with open(slide, "wb") as file:
        write_jpeg_tiff(file, levels())
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(slide), str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["tiles"] > 2000
    assert found["failed"] == 0
    assert found["peak"] < 2048, found
