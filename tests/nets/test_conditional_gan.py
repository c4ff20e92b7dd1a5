"""Shapes and sizes of generator and critic, that the class matters, and the layers by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medkd.nets.conditional_gan import (
    ConditionalBatchNorm,
    ConditionalCritic,
    ConditionalGenerator,
    MinibatchDeviation,
    SelfAttention,
    class_codes,
)


@pytest.mark.parametrize("size", [32, 48, 96, (64, 32), (256, 128)])
def test_sizes_of_images_and_logits(size):
    torch.manual_seed(0)
    generator, critic = ConditionalGenerator(3, size, width=2, latent=5), ConditionalCritic(3, size, width=2)
    label = torch.tensor([0, 2])
    image = generator(class_codes(label, 5, 3))
    assert image.shape == (2, 3, *((size, size) if isinstance(size, int) else size))
    assert image.abs().max() <= 1
    on_real, which = critic(image)
    assert (on_real.shape, which.shape) == ((2,), (2, 3))


@pytest.mark.parametrize("size", [33, 7, (64, 50), 2048])
def test_sizes_that_doubling_does_not_reach_are_refused(size):
    with pytest.raises(ValueError, match="power of two"):
        ConditionalGenerator(2, size)
    with pytest.raises(ValueError, match="power of two"):
        ConditionalCritic(2, size)


def test_attention_is_where_the_shorter_side_is_32_or_the_next_smaller():
    for size in (32, 64, 256, 96, 48):
        layers = ConditionalGenerator(2, size, width=2).attention
        sides = [
            size // 2 ** (len(layers) - 1 - n) for n, layer in enumerate(layers) if isinstance(layer, SelfAttention)
        ]
        assert sides == [32 if size in (32, 64, 256) else 24]
    assert not any(
        isinstance(m, SelfAttention) for m in ConditionalGenerator(2, 32, width=2, attention_side=0).modules()
    )
    kinds = [type(block) for block in ConditionalCritic(2, 64, width=2).blocks]
    assert kinds.count(SelfAttention) == 1
    assert kinds.index(SelfAttention) == 1


def test_the_class_alone_changes_the_image_and_every_weight_gets_a_gradient():
    torch.manual_seed(0)
    generator, critic = ConditionalGenerator(2, 32, width=4, latent=6), ConditionalCritic(2, 32, width=4)
    for module in (*generator.modules(), *critic.modules()):
        if isinstance(module, SelfAttention):
            nn.init.ones_(module.weight)
    code = class_codes(torch.zeros(4, dtype=torch.int64), 6, 2)
    other = torch.cat([code[:, :6], code[:, 6:].flip(1)], dim=1)
    image = generator(torch.cat([code, other]))
    assert (image[:4] - image[4:]).abs().mean() > 1e-3
    on_real, which = critic(image)
    (on_real.square().sum() + which[:, 0].sum()).backward()
    for network in (generator, critic):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_the_critic_has_spectral_norm_one_in_every_layer():
    torch.manual_seed(0)
    critic = ConditionalCritic(2, 32, width=4)
    with torch.no_grad():
        for _ in range(60):
            critic(torch.randn(4, 3, 32, 32))
    layers = [m for m in critic.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 3 * 3 + 4 + 3
    for layer in layers:
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2).item() == pytest.approx(1.0, abs=0.05)


def test_the_deviation_channel_is_that_of_the_group_and_sees_collapse():
    features = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = MinibatchDeviation(4)(features)
    assert torch.equal(found[:, :3], features)
    for group in (slice(0, 4), slice(4, 8)):
        expected = features[group].std(dim=0, correction=0).mean().item()
        assert found[group, 3].flatten().tolist() == pytest.approx([expected] * 64, rel=1e-5)
    assert MinibatchDeviation(4)(features[:1].expand(6, -1, -1, -1))[:, 3].max() < 1e-3


def test_attention_starts_as_the_identity_and_equals_its_formula():
    torch.manual_seed(0)
    layer, features = SelfAttention(8), torch.randn(1, 8, 4, 4)
    assert torch.equal(layer(features), features)
    nn.init.ones_(layer.weight)
    query = layer.query(features)[0, :, 1, 2]
    keys = nn.functional.max_pool2d(layer.key(features), 2)[0].flatten(1)
    values = nn.functional.max_pool2d(layer.value(features), 2)[0].flatten(1)
    weights = torch.softmax(query @ keys, dim=0)
    expected = features[0, :, 1, 2] + layer.out.weight[:, :, 0, 0] @ (values @ weights)
    torch.testing.assert_close(layer(features)[0, :, 1, 2], expected)


def test_conditional_normalization_scales_and_shifts_by_class():
    layer = ConditionalBatchNorm(2, 3)
    with torch.no_grad():
        layer.modulation.weight.copy_(torch.arange(12.0).view(4, 3))
    features, condition = torch.randn(5, 2, 3, 3), torch.eye(3)[[0, 1, 2, 0, 1]]
    normal = layer.norm(features)
    expected = normal[1, 1] * (1 + 4.0) + 10.0  # row 1 scales channel 1, row 3 shifts it; column 1 is the class
    torch.testing.assert_close(layer(features, condition)[1, 1], expected)


def test_the_generator_can_be_scripted():
    torch.manual_seed(0)
    generator = ConditionalGenerator(2, 32, width=2, latent=4).eval()
    code = class_codes(torch.tensor([0, 1]), 4, 2)
    torch.testing.assert_close(torch.jit.script(generator)(code), generator(code))


def test_codes_are_noise_and_one_hot_classes_from_the_given_generator():
    codes = [class_codes(torch.tensor([2, 0]), 4, 3, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*codes)
    assert codes[0][:, 4:].tolist() == [[0, 0, 1], [1, 0, 0]]
    assert class_codes(torch.tensor([1]), 4, 3, std=0.0)[0, :4].tolist() == [0, 0, 0, 0]
