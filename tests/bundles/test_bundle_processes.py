"""The bundles in processes of their own, where neither the network nor, for inference, medkd can be reached."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from bundle_copies import NAMES, Copy, copy_of

# Read by every Python process that has its folder on PYTHONPATH.
ISOLATION = """
import os, socket, sys

def refuse(*args, **kwargs):
    raise OSError("the network is out of reach")

if os.environ.get("TEST_WITHOUT_NETWORK"):
    connect = socket.socket.connect
    def connect_nearby(self, address):
        local = self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost", socket.gethostname())
        return connect(self, address) if local else refuse()
    socket.socket.connect = connect_nearby
    socket.socket.connect_ex = refuse

class WithoutMedkd:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "medkd":
            raise ModuleNotFoundError(f"No module named {name!r}")

if os.environ.get("TEST_WITHOUT_MEDKD"):
    sys.meta_path.insert(0, WithoutMedkd())
"""


def python(copy: Copy, *arguments: str, medkd: bool = True) -> subprocess.CompletedProcess[str]:
    """Run Python in the bundle's folder, without network; the arguments are those of its README."""
    isolation = copy.root.parent / "isolation"
    isolation.mkdir(exist_ok=True)
    (isolation / "sitecustomize.py").write_text(ISOLATION)
    environment = {
        **os.environ,
        "PYTHONPATH": str(isolation),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TEST_WITHOUT_NETWORK": "1",
        "TEST_WITHOUT_MEDKD": "" if medkd else "1",
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
    }
    done = subprocess.run(
        [sys.executable, *arguments], cwd=copy.root, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def options(overrides: dict[str, object]) -> list[str]:
    """Overrides as options of MONAI's command line."""
    return [part for key, value in overrides.items() for part in (f"--{key}", str(value))]


@pytest.fixture
def brain(tmp_path, cohort) -> Copy:
    """A fresh copy of the brain bundle."""
    return copy_of(NAMES[0], tmp_path, cohort)


def test_training_and_then_inference_without_network_and_medkd(brain: Copy, tmp_path):
    overrides = {**brain.overrides("train"), "bundle_root": "."}
    run = ("-m", "monai.bundle", "run", "--config_file")
    python(brain, *run, "configs/train.json", *options(overrides))
    assert (brain.root / "models" / "model.pt").is_file()
    python(
        brain, *run, "configs/inference.json", "--bundle_root", ".", "--dataset_dir", str(brain.cohort / "images"),
        "--output_dir", str(tmp_path / "out"), medkd=False,
    )  # fmt: skip
    images = {file.name.removesuffix(".nii.gz") for file in (brain.cohort / "images").iterdir()}
    assert {file.name.removesuffix("_seg.nii.gz") for file in (tmp_path / "out").iterdir()} == images


def test_isolation_hides_medkd_and_the_network(brain: Copy):
    attempt = "try:\n    {}\nexcept (OSError, ModuleNotFoundError) as error:\n    print(error)"
    connect = attempt.format("import socket; socket.create_connection(('192.0.2.1', 80), 1)")
    assert "out of reach" in python(brain, "-c", connect).stdout
    assert "No module named 'medkd'" in python(brain, "-c", attempt.format("import medkd"), medkd=False).stdout


def test_two_processes_train_under_torchrun(brain: Copy):
    overrides = {**brain.overrides("train"), "bundle_root": "."}
    python(
        brain, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "monai.bundle", "run",
        "--config_file", "['configs/train.json','configs/multi_gpu_train.json']", *options(overrides),
    )  # fmt: skip
    weights = torch.load(brain.root / "models" / "model.pt", weights_only=True)
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert len(list((brain.root / "run" / "checkpoints").glob("step-*.pt"))) == 1
