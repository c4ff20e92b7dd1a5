from __future__ import annotations

import pytest
import torch

from medkd.nets.critics import FeatureCritic, OutputCritic


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def test_the_output_critic_has_the_published_layers():
    # 4 × 4 kernels: 19 → 64 → 128 → 256 → 512 → 1, each with biases
    assert count(OutputCritic(19)) == 16 * (19 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512) + 64 + 128 + 256 + 512 + 1


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    ("critic_class", "layers", "smallest"),
    [(OutputCritic, 4, 32), (OutputCritic, 1, 4), (FeatureCritic, 4, 16), (FeatureCritic, 1, 2)],
)
def test_the_smallest_map_passes_and_a_smaller_one_is_refused(critic_class, layers, smallest, dims):
    critic = critic_class(3, width=4, spatial_dims=dims, layers=layers)
    assert critic(torch.randn(2, 3, *[smallest] * dims)).shape == (2, 1, *[1] * dims)
    with pytest.raises(ValueError, match=f"sides of at least {smallest}"):
        critic(torch.randn(2, 3, *[smallest] * (dims - 1), smallest - 1))


@pytest.mark.parametrize("critic_class", [OutputCritic, FeatureCritic])
def test_every_parameter_of_a_critic_has_a_gradient(critic_class):
    torch.manual_seed(0)
    critic = critic_class(3, width=4)
    logits = critic(torch.randn(2, 3, 64, 96))
    assert logits.shape == ((2, 1, 2, 3) if critic_class is OutputCritic else (2, 1, 4, 6))
    logits.square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in critic.parameters())
