"""Normalization layers found, and batch statistics that leave no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medkd.errors import ConfigError
from medkd.nets.normalization import affine_parameters, batch_norm_layers, batch_statistics


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(2, 4))


def test_instance_norm_is_no_batch_norm():
    assert len(batch_norm_layers(network())) == 1
    assert len(affine_parameters(network(), "TENT")) == 2
    assert len(affine_parameters(network(), "TENT", any_norm=True)) == 6


def test_batch_norm_without_scale_is_refused():
    with pytest.raises(ConfigError, match="BatchNorm2d without affine"):
        affine_parameters(nn.BatchNorm2d(4, affine=False), "TENT")


def test_modes_and_statistics_are_put_back_on_errors_too():
    built = network().train()
    before = {name: value.clone() for name, value in built.state_dict().items()}
    with batch_statistics(built):
        assert not any(module.training for module in built.modules())
        built(torch.randn(2, 1, 4, 4))
    with pytest.raises(RuntimeError), batch_statistics(built):
        built(torch.randn(2, 3, 4, 4))  # too many channels
    assert all(module.training for module in built.modules())
    after = built.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_gradients_pass_through_batch_statistics():
    built = network()
    with batch_statistics(built):
        built(torch.randn(2, 1, 4, 4)).square().sum().backward()
    assert built[1].weight.grad is not None
