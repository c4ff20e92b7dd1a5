from __future__ import annotations

import pytest
import torch
from torch import nn

from medkd.nets.translators import (
    ResNetGenerator,
    VAETranslator,
    init_gan_weights,
    multi_scale_critic,
    patch_critic,
)

GENERATORS = {
    "resnet": lambda dims=2: ResNetGenerator(width=4, blocks=2, spatial_dims=dims),
    "vae": lambda dims=2: VAETranslator(width=4, blocks=1, spatial_dims=dims),
}
every_generator = pytest.mark.parametrize("name", GENERATORS)


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("build", "published"),
    [
        (lambda: ResNetGenerator(3, 3), 11_378_179),
        (ResNetGenerator, 11_365_633),
        (VAETranslator, 11_127_937),
        (lambda: patch_critic(3), 2_764_737),
        (patch_critic, 2_762_689),
        (multi_scale_critic, 8_265_027),
    ],
    ids=["resnet-rgb", "resnet", "vae", "patch-rgb", "patch", "multi-scale"],
)
def test_parameters_number_as_in_the_releases(build, published):
    with torch.device("meta"):
        assert count(build()) == published


@every_generator
@pytest.mark.parametrize("size", [(8, 8), (16, 20), (8, 12, 16)], ids=str)
def test_translations_keep_the_size_and_lie_in_the_range_of_images(name, size):
    torch.manual_seed(0)
    network = GENERATORS[name](len(size))
    init_gan_weights(network, std=0.5)
    image = network(100 * torch.randn(2, 1, *size))
    assert image.shape == (2, 1, *size)
    assert image.min() >= -1
    assert image.max() <= 1
    assert image.std() > 0.1


@pytest.mark.parametrize("size", [(5, 6), (7, 9), (18, 22), (6, 7, 9)], ids=str)
def test_the_resnet_generator_keeps_sides_that_are_no_multiples_of_four(size):
    assert ResNetGenerator(width=4, blocks=1, spatial_dims=len(size))(torch.randn(1, 1, *size)).shape == (1, 1, *size)


def test_the_vae_refuses_sides_that_are_no_multiples_of_four():
    with pytest.raises(ValueError, match="multiples of 4"):
        GENERATORS["vae"]()(torch.randn(1, 1, 8, 10))


@every_generator
def test_every_parameter_of_a_generator_has_a_gradient(name):
    torch.manual_seed(0)
    network = GENERATORS[name]()
    network(torch.randn(2, 1, 16, 16)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert all(p.grad.abs().sum() > 0 for p in network.parameters() if p.dim() > 1)


@every_generator
@pytest.mark.parametrize("dims", [2, 3])
def test_a_scripted_generator_computes_the_same(name, dims):
    network = GENERATORS[name](dims).eval()
    image = torch.randn(1, 1, *(8, 12, 16)[:dims])
    torch.testing.assert_close(torch.jit.script(network)(image), network(image))


def test_a_vae_reconstructs_from_its_latent_mean():
    torch.manual_seed(0)
    network = GENERATORS["vae"]()
    image = torch.randn(2, 1, 16, 12)
    latent = network.encode(image)
    assert latent.shape == (2, 16, 4, 3)
    torch.testing.assert_close(network.decode(latent), network(image), rtol=0, atol=0)


def test_gan_weights_have_the_asked_deviation_and_no_bias():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(8, 64, 3), nn.BatchNorm2d(64), nn.InstanceNorm2d(64), nn.Linear(64, 64))
    assert init_gan_weights(network, std=0.05) is network
    for layer, mean in ((network[0], 0.0), (network[1], 1.0), (network[3], 0.0)):
        assert layer.weight.std().item() == pytest.approx(0.05, rel=0.3)
        assert layer.weight.mean().item() == pytest.approx(mean, abs=0.02)
        assert layer.bias.abs().sum() == 0


def receptive_field(critic, side):
    """Sides of the part of the image that moves the middle logit; norms, which see everything, are taken out."""
    for parent in list(critic.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.InstanceNorm2d):
                setattr(parent, name, nn.Identity())
    image = torch.randn(1, 1, side, side, requires_grad=True)
    logits = critic(image)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    seen = image.grad[0, 0] != 0
    return [int(seen.any(dim=axis).sum()) for axis in (0, 1)]


@pytest.mark.parametrize(("layers", "field"), [(1, 16), (2, 34), (3, 70)])
def test_a_patch_critic_sees_the_patch_it_is_named_after(layers, field):
    torch.manual_seed(0)
    assert receptive_field(patch_critic(width=4, layers=layers), 160) == [field, field]


def test_a_patch_critic_gives_a_map_of_logits_from_which_every_parameter_learns():
    torch.manual_seed(0)
    critic = patch_critic(width=4)
    logits = critic(torch.randn(2, 1, 64, 64))
    assert logits.shape == (2, 1, 6, 6)
    logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in critic.parameters())


def test_a_multi_scale_critic_gives_one_map_per_halved_resolution():
    torch.manual_seed(0)
    critic = multi_scale_critic(width=4)
    logits = critic(torch.randn(2, 1, 64, 80))
    assert [tuple(scale.shape) for scale in logits] == [(2, 1, 4, 5), (2, 1, 2, 2), (2, 1, 1, 1)]
    sum(scale.square().mean() for scale in logits).backward()
    assert all(p.grad.abs().sum() > 0 for p in critic.parameters() if p.dim() > 1)


@pytest.mark.parametrize(
    ("build", "smallest"), [(lambda: patch_critic(width=4), 24), (lambda: multi_scale_critic(width=4), 64)]
)
def test_the_smallest_image_passes_a_critic_and_a_smaller_one_is_refused(build, smallest):
    critic = build()
    critic(torch.randn(1, 1, smallest, smallest))
    with pytest.raises(ValueError, match=f"at least {smallest}"):
        critic(torch.randn(1, 1, smallest, smallest - 1))
