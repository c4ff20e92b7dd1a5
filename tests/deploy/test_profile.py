from __future__ import annotations

import pytest
import torch
from bundle_factory import make_bundle, write_image
from torch import nn

from medkd.data.volumes import read_volume
from medkd.deploy.bundle import load_bundle
from medkd.deploy.profile import count_macs, count_parameters, interleaved_times_ms, profile_bundles


def test_macs_of_a_convolution_are_counted_by_hand():
    network = nn.Conv2d(3, 8, kernel_size=3, padding=1, bias=False)
    assert count_macs(network, torch.zeros(1, 3, 10, 12)) == 10 * 12 * 8 * 3 * 9
    assert count_parameters(network) == 8 * 3 * 9


def test_counting_leaves_the_mode_alone():
    network = nn.Conv2d(1, 1, 1).train()
    count_macs(network, torch.zeros(1, 1, 2, 2))
    assert network.training


def test_times_are_interleaved():
    order = []
    times = interleaved_times_ms({name: lambda name=name: order.append(name) for name in "ab"}, 2)
    assert order == ["a", "b"] * 3
    assert set(times) == {"a", "b"}


def test_profile_of_two_bundles(shared_bundle, tmp_path):
    image = read_volume(write_image(tmp_path / "image.nii.gz"))
    bundles = [load_bundle(shared_bundle), load_bundle(make_bundle(tmp_path / "b_segmentation", seed=1))]
    costs = profile_bundles(bundles, image=image, rounds=1)
    assert [cost.name for cost in costs] == ["small_segmentation", "b_segmentation"]
    first = costs[0]
    assert first.parameters == sum(p.numel() for p in bundles[0].network.parameters())
    assert first.window == (1, 16, 16, 16)
    assert first.macs == costs[1].macs > 0
    assert first.size_bytes == (shared_bundle / "models" / "model.pt").stat().st_size
    assert first.window_ms > 0
    assert first.volume_ms > first.window_ms
    assert first.peak_memory_bytes is None or first.peak_memory_bytes >= 0
    assert first.memory_is == "process"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_profile_on_a_gpu_measures_device_memory(shared_bundle, tmp_path):
    image = read_volume(write_image(tmp_path / "image.nii.gz"))
    (cost,) = profile_bundles([load_bundle(shared_bundle, device="cuda")], image=image, rounds=1)
    assert cost.memory_is == "device"
    assert cost.peak_memory_bytes
