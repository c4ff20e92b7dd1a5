from __future__ import annotations

import json

import onnxruntime
import pytest
import torch
from bundle_factory import TRAIN_CONFIG, make_bundle, write_image

from medkd.data.volumes import read_volume
from medkd.deploy import export
from medkd.deploy.bundle import load_bundle
from medkd.deploy.export import export_model
from medkd.deploy.windows import sample_volume, sample_windows, window_size
from medkd.errors import ConfigError


@pytest.fixture(scope="module")
def loaded(shared_bundle):
    return load_bundle(shared_bundle)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    return read_volume(write_image(tmp_path_factory.mktemp("image") / "image.nii.gz", shape=(40, 40, 20)))


@pytest.mark.parametrize("output_format", ["torchscript", "onnx", "pt2"])
@pytest.mark.filterwarnings("ignore")
def test_export_equals_the_network_on_the_image(loaded, image, tmp_path, output_format):
    result = export_model(loaded, tmp_path / "network", output_format=output_format, image=image)
    assert [path.name for path in tmp_path.iterdir()] == ["network"]
    assert result.largest_difference <= 1e-5 * result.largest_logit
    assert result.agreement == 1
    assert result.windows == (4, 1, 16, 16, 16)


@pytest.mark.filterwarnings("ignore")
def test_onnx_export_takes_any_batch_size(loaded, image, tmp_path):
    export_model(loaded, tmp_path / "n.onnx", output_format="onnx", image=image)
    session = onnxruntime.InferenceSession(str(tmp_path / "n.onnx"), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        (output,) = session.run(None, {"image": torch.zeros(batch, 1, 16, 16, 16).numpy()})
        assert output.shape == (batch, 3, 16, 16, 16)


def test_export_that_differs_is_refused_and_leaves_nothing(loaded, image, tmp_path, monkeypatch):
    monkeypatch.setitem(export._READERS, "torchscript", lambda file: lambda windows: loaded.network(windows) + 1)
    with pytest.raises(ConfigError, match="differs from the network by 1"):
        export_model(loaded, tmp_path / "n.ts", output_format="torchscript", image=image)
    assert list(tmp_path.iterdir()) == []


def test_unknown_format_is_refused(loaded, tmp_path):
    with pytest.raises(ConfigError, match="torchscript, onnx, pt2"):
        export_model(loaded, tmp_path / "x", output_format="zip")  # type: ignore[arg-type]


def test_windows_of_a_two_dimensional_network_are_slices(image, tmp_path):
    config = json.loads(json.dumps(TRAIN_CONFIG))
    config["network_def"] |= {"spatial_dims": 2}
    config["inferer"] = {"_target_": "monai.inferers.SliceInferer", "roi_size": [16, 24], "spatial_dim": 2}
    bundle = load_bundle(make_bundle(tmp_path / "slices_segmentation", train_config=config))
    assert window_size(bundle) == (16, 24)
    windows = sample_windows(bundle, image)
    assert windows.shape == (4, 1, 16, 24)
    assert len({float(window.sum()) for window in windows}) == 4


def test_sample_volume_is_the_real_template():
    volume = sample_volume()
    assert volume.array.shape == (197, 233, 189)
    assert volume.spacing_mm == (1, 1, 1)
