from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from bundle_factory import write_image
from PIL import Image
from torch import nn

from medkd.__main__ import main
from medkd.data import demo_slide
from medkd.deploy import int8_gate
from medkd.deploy.bundle import load_bundle
from medkd.deploy.calibration import TileSamples, VolumeSamples, tile_samples, volume_samples
from medkd.deploy.int8_gate import tile_auc
from medkd.deploy.onnx_network import OnnxNetwork, OnnxTiles
from medkd.deploy.quantize import export_int8, quantize_tiles, quantize_volumes
from medkd.deploy.slide_bundle import slide_task
from medkd.deploy.tile_program import TileProgram, WideStem
from medkd.errors import ConfigError, InputError
from medkd.wsi.fold import TileNetwork
from medkd.wsi.grid import TileGrid
from medkd.wsi.predict import predict_slide
from medkd.wsi.prediction import TileTask
from medkd.wsi.slides import Slide

SIZE = 32
STUDENT = Path(__file__).parents[2] / "bundles" / "tissue_classification"
TASK = TileTask(
    task="classification", size=SIZE, mpp=0.5, mean=(0.61, 0.45, 0.7), std=(0.2, 0.2, 0.15), classes=("pale", "dark")
)  # fmt: skip

EMPTY = np.full((8, SIZE, SIZE, 3), (156, 115, 178), np.uint8)  # of the mean color: no activation goes anywhere


def small_network(*, kernel=3, stride=2, padding=1):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, kernel, stride=stride, padding=padding, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2),
    )  # fmt: skip


def tiles_of(count, seed):
    """Textured tiles of two overlapping classes: how far a blob in the middle is darker."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    ways = np.linspace(-1, 1, SIZE)
    blob = np.exp(-4 * (ways[:, None] ** 2 + ways**2))[None, :, :, None]
    depth = (60 * labels + rng.normal(0, 22, count))[:, None, None, None]
    tiles = 170 + rng.normal(0, 8, (count, 1, 1, 3)) - depth * blob + rng.normal(0, 10, (count, SIZE, SIZE, 3))
    return tiles.clip(0, 255).round().astype(np.uint8), labels.astype(np.int64)


def normalized(tiles):
    levels = torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255
    return (levels - torch.tensor(TASK.mean)[:, None, None]) / torch.tensor(TASK.std)[:, None, None]


@pytest.fixture(scope="module")
def trained():
    network = small_network()
    tiles, labels = tiles_of(128, 1)
    images, wanted = normalized(tiles), torch.from_numpy(labels)
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), wanted).backward()
        optimizer.step()
    return network.eval()


@pytest.fixture(scope="module")
def samples():
    calibration, _ = tiles_of(64, 1)
    comparison, labels = tiles_of(200, 2)
    return TileSamples(calibration, comparison, labels, "64 training tiles", "200 validation tiles")


@pytest.fixture(scope="module")
def exported(trained, samples, tmp_path_factory):
    return quantize_tiles(trained, TASK, samples, tmp_path_factory.mktemp("int8") / "network.onnx")


def test_int8_is_about_as_good_as_float32_on_labeled_tiles(exported, trained, samples):
    assert exported.gate.metric == "AUC"
    assert 0.8 < exported.gate.float32 < 1
    assert abs(exported.gate.drop) <= 0.005
    assert exported.gate.compared == 200
    with torch.inference_mode():
        expected = trained(normalized(samples.comparison)).softmax(1).numpy()
    assert exported.gate.float32 == pytest.approx(tile_auc(expected, samples.labels), abs=1e-4)
    assert [path.name for path in exported.path.parent.iterdir()] == ["network.onnx"]


def test_int8_file_computes_in_integers_from_bytes_to_logits(exported):
    graph = onnx.load(str(exported.path)).graph
    (tiles,) = graph.input
    assert tiles.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    products = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(products) == 3
    assert all(made_by[name] == "DequantizeLinear" for node in products for name in node.input[:2])
    assert not {"Cast", "Sub", "BatchNormalization"} & {node.op_type for node in graph.node}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    scales = [weights[node.input[1]] for node in graph.node if node.op_type == "DequantizeLinear"]
    assert {16} <= {scale.dims[0] for scale in scales if scale.dims}  # per channel


def test_int8_does_not_depend_on_the_batch(exported, samples):
    network = OnnxTiles(exported.path)
    tiles = torch.from_numpy(samples.comparison[:7])
    assert torch.equal(network(tiles), torch.cat([network(tiles[:1]), network(tiles[1:])]))


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (7, 2, 3), (5, 1, 2), (4, 4, 0), (3, 3, 0)])
def test_program_of_bytes_equals_the_network(kernel, stride, padding):
    network = small_network(kernel=kernel, stride=stride, padding=padding).eval()
    tiles, _ = tiles_of(3, 5)
    folded = TileNetwork(network, mean=(0.6, 0.4, 0.2), std=TASK.std, size=SIZE)  # borders are whole grey levels
    program = TileProgram(folded).eval()
    assert program.keeps_bytes
    with torch.inference_mode():
        expected, found = folded(torch.from_numpy(tiles)), program(torch.from_numpy(tiles))
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("width", [9, 16, 33])
@pytest.mark.parametrize(("outputs", "kernel", "stride"), [(8, 3, 2), (16, 3, 1), (40, 7, 2), (64, 1, 1), (12, 2, 3)])
def test_wide_stem_equals_the_convolution(width, outputs, kernel, stride):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, outputs, kernel, stride=stride)
    wide = WideStem(conv, width, relu=True)
    images = torch.randn(2, 3, 11, width)
    padded = nn.functional.pad(images, (0, wide.missing), value=7.0).permute(0, 2, 3, 1)
    assert torch.allclose(wide(padded), conv(images).relu(), atol=1e-5)


def test_gate_refuses_a_network_calibrated_on_empty_tiles_and_leaves_nothing(trained, samples, tmp_path):
    broken = replace(samples, calibration=EMPTY)
    with pytest.raises(ConfigError, match=r"AUC falls from 0\.\d+ in float32 to 0\.\d+ in int8 .*not written"):
        quantize_tiles(trained, TASK, broken, tmp_path / "network.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_refused_export_leaves_the_former_file(trained, samples, tmp_path):
    out = tmp_path / "network.onnx"
    out.write_bytes(b"former")
    with pytest.raises(ConfigError):
        quantize_tiles(trained, TASK, replace(samples, calibration=EMPTY), out)
    assert out.read_bytes() == b"former"


@pytest.mark.slow
def test_without_labels_only_agreement_is_claimed(trained, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(int8_gate, "LEAST_AGREEMENT", 0.9)
    gate = quantize_tiles(trained, TASK, replace(samples, labels=None), tmp_path / "network.onnx").gate
    assert (gate.metric, gate.float32, gate.int8, gate.drop) == (None, None, None, None)
    assert 0.9 <= gate.agreement <= 1
    monkeypatch.setattr(int8_gate, "LEAST_AGREEMENT", 1.01)
    with pytest.raises(ConfigError, match="give the same class to"):
        quantize_tiles(trained, TASK, replace(samples, labels=None), tmp_path / "other.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["network.onnx"]


def test_missing_onnxruntime_is_named(trained, samples, tmp_path, monkeypatch, exported):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"onnxruntime: is not installed; run `pip install onnxruntime`"):
        quantize_tiles(trained, TASK, samples, tmp_path / "network.onnx")
    with pytest.raises(ConfigError, match="is not installed"):
        OnnxTiles(exported.path)
    assert list(tmp_path.iterdir()) == []


def test_slide_prediction_takes_an_int8_file(exported, trained, tmp_path):
    assert OnnxTiles(exported.path).task == TASK
    path = demo_slide(tmp_path / "demo.tiff", tiles=4)
    network = OnnxTiles(quantize_tiles(trained, TASK, tile_samples(path, TASK), tmp_path / "network.onnx").path)
    with Slide(path) as slide:
        grid = TileGrid.build(slide, size=SIZE, mpp=slide.mpp, min_tissue=0, border="drop")
        asked = {"classes": TASK.classes, "mean": TASK.mean, "std": TASK.std}
        int8 = predict_slide(network, slide, grid, **asked)
        exact = predict_slide(trained, slide, grid, **asked, amp=False)
        assert int8.precision == "int8"
        assert np.abs(int8.probabilities - exact.probabilities).mean() < 0.02
        with pytest.raises(ConfigError, match="prepared with mean"):
            predict_slide(network, slide, grid, **{**asked, "mean": (0.5, 0.5, 0.5)})
        other = TileGrid.build(slide, size=48, mpp=slide.mpp, min_tissue=0, border="drop")
        with pytest.raises(ConfigError, match="is for tiles of 32 px"):
            predict_slide(network, slide, other, **asked)


@pytest.mark.slow
def test_shipped_student_keeps_its_answers_on_a_slide(tmp_path):
    slide = demo_slide(tmp_path / "demo.tiff", tiles=4)
    bundle = load_bundle(STUDENT)
    result = export_int8(bundle, tmp_path / "out" / "student.onnx", slide)
    assert result.gate.metric is None
    assert result.gate.agreement >= 0.99
    assert result.size_bytes < 0.4 * result.float32_bytes
    assert OnnxTiles(result.path).task == slide_task(bundle)


@pytest.mark.parametrize("content", [b"", b"no model"])
def test_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "network.onnx").write_bytes(content)
    with pytest.raises(InputError, match="is no ONNX file"):
        OnnxTiles(tmp_path / "network.onnx")


def test_datalist_calibrates_on_training_and_compares_on_validation(tmp_path):
    tiles, labels = tiles_of(8, 3)
    cases = []
    for number, (tile, label) in enumerate(zip(tiles, labels.tolist(), strict=True)):
        Image.fromarray(tile).save(tmp_path / f"{number}.png")
        cases.append({"image": f"{number}.png", "label": label, "patient": f"p{number}"})
    listed = {"name": "tiles", "modality": "H&E", "labels": {"0": "pale", "1": "dark"}}
    (tmp_path / "list.json").write_text(json.dumps(listed | {"training": cases[:5], "validation": cases[5:]}))
    found = tile_samples(tmp_path / "list.json", TASK)
    assert np.array_equal(found.calibration, tiles[:5])
    assert np.array_equal(found.comparison, tiles[5:])
    assert found.labels.tolist() == labels[5:].tolist()
    without = tile_samples(tmp_path, TASK)
    assert np.array_equal(without.comparison, tiles[1::2])
    assert without.labels is None
    with pytest.raises(InputError, match=r"is 32×32 px, the network takes 48×48; cut tiles with `medkd slide tile"):
        tile_samples(tmp_path, replace(TASK, size=48))
    with pytest.raises(InputError, match="is one picture"):
        tile_samples(tmp_path / "0.png", TASK)
    (tmp_path / "list.json").write_text(json.dumps(listed | {"training": cases}))
    with pytest.raises(ConfigError, match="needs a training and a validation section"):
        tile_samples(tmp_path / "list.json", TASK)


def test_command_needs_real_data(shared_bundle, tmp_path, capsys):
    words = ["export", str(shared_bundle), "--out", str(tmp_path / "n"), "--format"]
    assert main([*words, "onnx", "--int8"]) == 2
    assert "--int8: goes with --format onnx and --calibration" in capsys.readouterr().err
    assert main([*words, "pt2", "--calibration", "nowhere"]) == 2
    assert "are for --int8" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_auc_of_several_classes_is_their_mean():
    probabilities = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]] * 0.5
    assert tile_auc(probabilities, np.array([0, 1, 2, 0])) == 1
    assert tile_auc(probabilities, np.array([0, 0, 0, 0])) is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_volume_network_is_compared_on_whole_volumes(shared_bundle, tmp_path, monkeypatch):
    images = [str(write_image(tmp_path / f"{seed}.nii.gz", seed=seed)) for seed in range(2)]
    monkeypatch.setattr(int8_gate, "LEAST_AGREEMENT", 0.5)  # weights are random: many voxels are near a tie
    bundle = load_bundle(shared_bundle)
    found = volume_samples(tmp_path)
    assert found == VolumeSamples(images[:1], [{"image": images[1]}], "1 of 2 volumes", "1 of 2 volumes, others")
    result = quantize_volumes(bundle, found, tmp_path / "network.onnx")
    assert 0.5 <= result.gate.agreement <= 1
    windows = torch.zeros(2, 1, 16, 16, 16)
    assert OnnxNetwork(result.path)(windows).shape == (2, 3, 16, 16, 16)
