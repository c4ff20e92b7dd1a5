"""TENT and BN adaptation: what is trained, when it is forgotten, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from engine import toy
from methods.hand_loop import assert_same_parameters, by_hand, trained
from monai.networks.nets import BasicUNet, UNet
from torch import nn

from medkd.errors import ConfigError
from medkd.methods.tent import Tent, VolumeAdapter, adapt, adapt_batch_norm
from medkd.nets.normalization import batch_norm_layers


def entropy(logits: torch.Tensor) -> torch.Tensor:
    p = logits.softmax(1)
    return -(p * p.log()).sum(1).mean()


def volume(seed: int = 0, slices: int = 7) -> torch.Tensor:
    return torch.randn(slices, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def test_steps_equal_a_hand_written_loop():
    built = trained(toy.method(Tent, norm=True), 4)
    student = toy.network(norm=True)
    for layer in (student[0], student[-1]):
        layer.requires_grad_(False)
    by_hand(Tent, {"student": student}, 4, lambda batch, *_: {"student": entropy(student(batch["target"]["image"]))})
    assert_same_parameters(built.student, student, atol=0)
    assert toy.same_state(built.student, student)  # running statistics too


def test_only_scales_and_shifts_are_trained():
    built = toy.method(Tent, norm=True)
    assert [tuple(p.shape) for p in built.role_parameters("student")] == [(4,), (4,)]


def test_only_batch_norm_is_in_train_mode():
    network = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.9), nn.Conv2d(4, 3, 1))
    built = Tent(network).train()
    assert [module.training for module in network] == [False, True, False, False]
    assert not any(module.training for module in built.eval().student.modules())


def test_weight_zero_is_batch_norm_adaptation():
    """No parameter moves; the running statistics become the target's."""
    built = trained(toy.method(Tent, norm=True, entropy_weight=0.0), 4)
    fresh = toy.network(norm=True)
    for (name, found), expected in zip(built.student.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(found, expected), name
    assert not torch.equal(built.student[1].running_mean, fresh[1].running_mean)


@pytest.mark.parametrize("any_norm", [False, True])
def test_a_network_without_affine_normalization_is_refused(any_norm):
    network = UNet(2, 1, 3, (4, 8), (2,))  # MONAI's default: InstanceNorm without scale and shift
    with pytest.raises(ConfigError, match=r'InstanceNorm2d.*norm="batch"'):
        Tent(network, any_norm=any_norm)
    with pytest.raises(ConfigError, match='norm="batch"'):
        adapt(network, volume(), any_norm=any_norm)
    with pytest.raises(ConfigError, match='norm="batch"'):
        adapt_batch_norm(network, volume())


def test_a_network_without_normalization_is_refused():
    with pytest.raises(ConfigError, match=r'no normalization layer.*norm="batch"'):
        Tent(toy.network())
    with pytest.raises(ConfigError, match="BN adaptation"):
        Tent(nn.Sequential(nn.Conv2d(1, 4, 1), nn.GroupNorm(2, 4)), entropy_weight=0.0, any_norm=True)


def test_affine_instance_norm_is_taken_on_request():
    network = BasicUNet(2, 1, 3, (4, 4, 8, 8, 8, 4))
    with pytest.raises(ConfigError, match="InstanceNorm2d"):
        Tent(network)
    built = Tent(network, any_norm=True)
    trained_ones = built.role_parameters("student")
    assert trained_ones
    assert all(parameter.ndim == 1 for parameter in trained_ones)
    before = adapt(network, torch.randn(2, 1, 32, 32), any_norm=True)
    assert before.shape == (2, 3, 32, 32)


def test_a_volume_is_forgotten_before_the_next():
    network = toy.network(norm=True)
    adapter = VolumeAdapter(network, learning_rate=0.1, batch_size=2)
    first = adapter(volume(0))
    adapter(volume(1))
    assert torch.equal(adapter(volume(0)), first)
    adapter.reset()
    assert toy.same_state(adapter.network, network)


def test_online_it_remembers_until_told_otherwise():
    adapter = VolumeAdapter(toy.network(norm=True), learning_rate=0.1, batch_size=2, reset_per_volume=False)
    first = adapter(volume(0))
    assert not torch.equal(adapter(volume(0)), first)
    adapter.reset()
    assert torch.equal(adapter(volume(0)), first)


def test_the_network_handed_in_stays_as_it_is():
    network = toy.network(norm=True).train()
    before = copy.deepcopy(network)
    adapt(network, volume(), learning_rate=0.1)
    adapt_batch_norm(network, volume())
    assert toy.same_state(network, before)
    assert all(module.training for module in network.modules())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_prediction_is_the_one_before_its_own_update():
    network = toy.network(norm=True)
    one_batch = adapt(network, volume(), batch_size=16)
    torch.testing.assert_close(one_batch, adapt_batch_norm(network, volume(), batch_size=16))


def test_test_time_steps_equal_a_hand_written_loop():
    network = toy.network(norm=True)
    found = adapt(network, volume(slices=6), batch_size=3, learning_rate=0.01, steps=2)
    student = copy.deepcopy(network).train()
    optimizer = torch.optim.Adam(student[1].parameters(), lr=0.01)
    expected = []
    for part in volume(slices=6).split(3):
        for _ in range(2):
            logits = student(part)
            optimizer.zero_grad()
            entropy(logits).backward()
            optimizer.step()
        expected.append(logits.detach())
    torch.testing.assert_close(found, torch.cat(expected))


def test_batch_norm_adaptation_uses_the_volumes_own_statistics():
    network = toy.network(norm=True).eval()
    network[1].running_mean.fill_(100.0)
    torch.testing.assert_close(adapt_batch_norm(network, volume()), copy.deepcopy(network).train()(volume()).detach())
    shifted = volume() * 3 + 5  # BatchNorm behind a convolution without padding effects undoes gain and offset
    network[0].padding = (0, 0)
    network[1].eps = 1e-12
    torch.testing.assert_close(
        adapt_batch_norm(network, shifted), adapt_batch_norm(network, volume()), atol=1e-4, rtol=1e-4
    )


def test_batches_of_a_volume_are_split_evenly():
    seen = []
    network = toy.network(norm=True)
    network.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    adapt_batch_norm(network, volume(slices=17), batch_size=16)
    assert seen == [9, 8]


def test_layers_without_running_statistics_stay_without():
    network = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    adapt_batch_norm(network, volume())
    (layer,) = batch_norm_layers(network)
    assert layer.running_mean is None
    assert not layer.track_running_stats
