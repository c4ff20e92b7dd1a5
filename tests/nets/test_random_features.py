from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from medkd.nets.random_features import RandomFeatures

FINGERPRINT = """
import hashlib, torch
from medkd.nets.random_features import RandomFeatures
torch.rand(5)
weights = b"".join(p.numpy().tobytes() for p in RandomFeatures(seed=5).parameters())
print(hashlib.sha256(weights).hexdigest())
"""


def fingerprint(seed):
    return hashlib.sha256(b"".join(p.numpy().tobytes() for p in RandomFeatures(seed=seed).parameters())).hexdigest()


def test_weights_are_the_same_in_another_process_with_other_threads():
    environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", FINGERPRINT], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == fingerprint(5)


def test_weights_are_the_same_in_every_thread():
    with ThreadPoolExecutor(4) as pool:
        made = set(pool.map(fingerprint, [5] * 8))
    assert made == {fingerprint(5)}
    assert fingerprint(6) not in made


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    RandomFeatures()
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("size", [(8, 8), (33, 40)])
def test_features_have_the_stated_length_and_belong_to_one_image_each(size):
    network = RandomFeatures(channels=2)
    torch.manual_seed(0)
    images = torch.rand(3, 2, *size) * 2 - 1
    features = network(images)
    assert features.shape == (3, network.features) == (3, 112)
    torch.testing.assert_close(features[1:2], network(images[1:2]))


def test_features_tell_apart_intensity_contrast_and_texture():
    torch.manual_seed(0)
    noise = torch.randn(1, 1, 32, 32).clamp(-1, 1)
    smooth = torch.nn.functional.avg_pool2d(noise, 5, stride=1, padding=2)
    network = RandomFeatures()
    base = network(smooth)
    for other in (smooth + 0.3, 2 * smooth, noise):
        assert (network(other) - base).norm() > 0.1 * base.norm()


def test_features_stay_frozen_in_train_mode_and_pass_gradients_to_the_image():
    network = RandomFeatures().train()
    image = torch.rand(1, 1, 16, 16, requires_grad=True)
    network(image).sum().backward()
    assert image.grad.abs().sum() > 0
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
