"""MONAI's own commands on a bundle that medkd wrote, without network."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnxruntime
import pytest
import torch
from monai.bundle import ckpt_export, load, onnx_export, verify_metadata, verify_net_in_out

from medkd.deploy.bundle import load_bundle

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def bundle(shared_bundle, tmp_path_factory) -> Path:
    return Path(shutil.copytree(shared_bundle, tmp_path_factory.mktemp("monai") / "copy_segmentation"))


@pytest.fixture
def files(bundle) -> dict[str, str]:
    configs = bundle / "configs"
    return {"meta_file": str(configs / "metadata.json"), "config_file": str(configs / "inference.json")}


def test_verify_metadata_takes_the_schema_in_the_bundle(bundle, files, monkeypatch):
    monkeypatch.setattr("monai.apps.utils._download_with_progress", None)
    verify_metadata(meta_file=files["meta_file"], filepath=str(bundle / "eval" / "schema.json"))


def test_verify_net_in_out(files):
    verify_net_in_out(net_id="network_def", device="cpu", **files)


def test_ckpt_export_scripts_the_network(bundle, files, tmp_path):
    ckpt_export(
        net_id="network_def",
        filepath=str(tmp_path / "model.ts"),
        ckpt_file=str(bundle / "models" / "model.pt"),
        **files,
    )
    window = torch.rand(1, 1, 16, 16, 16)
    scripted = torch.jit.load(str(tmp_path / "model.ts")).eval()
    torch.testing.assert_close(scripted(window), load_bundle(bundle).network(window), atol=1e-6, rtol=1e-5)


def test_onnx_export(bundle, files, tmp_path):
    onnx_export(
        net_id="network_def",
        filepath=str(tmp_path / "model.onnx"),
        ckpt_file=str(bundle / "models" / "model.pt"),
        **files,
    )
    onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])


def test_monai_loads_the_network_with_its_weights(bundle):
    network = load(name=bundle.name, bundle_dir=str(bundle.parent), workflow_type="inference", source="github")
    own = load_bundle(bundle).network.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in network.state_dict().items())
