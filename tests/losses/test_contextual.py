"""The contextual loss: reference values, its definition element by element, chunks, memory, degenerate images."""

from __future__ import annotations

import math

import pytest
import torch
from torch.overrides import TorchFunctionMode

from medkd.losses.contextual import contextual_loss


@pytest.fixture
def features() -> tuple[torch.Tensor, torch.Tensor]:
    k = torch.arange(128, dtype=torch.float64)
    x, y = torch.sin(0.7 * k + 0.1 * k**1.5), torch.cos(0.45 * k + 0.05 * k**1.5)
    return x.reshape(1, 8, 4, 4), y.reshape(1, 8, 4, 4)


def random_features(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(("bandwidth", "value"), [(0.1, 0.4984092295), (0.5, 1.0827884364), (1.0, 1.5967133929)])
@pytest.mark.parametrize("chunk", [1024, 5, 1])
def test_equals_the_reference(features, bandwidth, value, chunk):
    assert contextual_loss(*features, bandwidth=bandwidth, chunk=chunk).item() == pytest.approx(value, abs=1e-10)


def test_is_not_symmetric(features):
    x, y = features
    assert contextual_loss(y, x, bandwidth=0.5).item() == pytest.approx(1.1139380686, abs=1e-10)


def test_identical_images_have_the_least_loss_which_is_below_zero(features):
    x, _ = features
    assert contextual_loss(x, x).item() == pytest.approx(-0.0000100000, abs=1e-10)


def by_loops(generated: torch.Tensor, reference: torch.Tensor, bandwidth: float) -> float:
    total = 0.0
    for image, other in zip(generated, reference, strict=True):
        x, y = image.flatten(1).t().tolist(), other.flatten(1).t().tolist()
        mean = [sum(column) / len(y) for column in zip(*y, strict=True)]

        def centered(patch, mean=mean):
            return [value - m for value, m in zip(patch, mean, strict=True)]

        def cosine(a, b):
            return sum(p * q for p, q in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

        best = [0.0] * len(y)
        for patch in x:
            distances = [1 - cosine(centered(patch), centered(target)) for target in y]
            weights = [math.exp((1 - d / (min(distances) + 1e-5)) / bandwidth) for d in distances]
            best = [max(old, w / sum(weights)) for old, w in zip(best, weights, strict=True)]
        total -= math.log(sum(best) / len(best) + 1e-5)
    return total / len(generated)


@pytest.mark.parametrize("size", [(3,), (3, 2), (2, 2, 2)])
def test_equals_its_definition_by_loops_for_maps_of_different_size(size):
    generated, reference = random_features(2, 4, *size), random_features(2, 4, 5, seed=1)
    assert contextual_loss(generated, reference).item() == pytest.approx(by_loops(generated, reference, 0.5), abs=1e-12)


def test_images_of_a_batch_do_not_depend_on_each_other():
    generated, reference = random_features(3, 4, 3, 3), random_features(3, 4, 3, 3, seed=1)
    alone = [contextual_loss(generated[i : i + 1], reference[i : i + 1]) for i in range(3)]
    assert contextual_loss(generated, reference).item() == pytest.approx(torch.stack(alone).mean().item(), abs=1e-14)


def test_the_order_of_patches_does_not_matter(features):
    x, y = features
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    shuffled = y.flatten(2)[:, :, order]
    assert contextual_loss(x, shuffled).item() == pytest.approx(contextual_loss(x, y).item(), abs=1e-12)


@pytest.mark.parametrize("chunk", [3, 100])
def test_gradients_agree_with_finite_differences(chunk):
    generated = random_features(2, 3, 2, 3).requires_grad_()
    reference = random_features(2, 3, 2, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: contextual_loss(x, y, chunk=chunk), (generated, reference))


def test_chunks_change_neither_the_value_nor_the_gradients():
    results = []
    for chunk in (10_000, 64, 7):
        generated = random_features(2, 6, 12, 12).requires_grad_()
        reference = random_features(2, 6, 12, 12, seed=1).requires_grad_()
        loss = contextual_loss(generated, reference, chunk=chunk)
        results.append((loss.detach(), *torch.autograd.grad(loss, (generated, reference))))
    for other in results[1:]:
        for whole, chunked in zip(results[0], other, strict=True):
            torch.testing.assert_close(chunked, whole, rtol=1e-10, atol=1e-12)


class LargestTensor(TorchFunctionMode):
    """Records the largest tensor that any operation of the forward pass returns, and what autograd keeps of it."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_memory_is_bounded_by_the_chunk_and_not_by_the_map():
    generated = random_features(1, 4, 32, 32, dtype=torch.float32).requires_grad_()
    reference = random_features(1, 4, 32, 32, seed=1, dtype=torch.float32)
    kept: list[int] = []
    chunk, patches = 64, 1024
    with (
        LargestTensor() as largest,
        torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t),
    ):
        loss = contextual_loss(generated, reference, chunk=chunk)
    assert largest.elements == chunk * patches
    # Between forward and backward the features alone are kept, no matrix of patches by patches, nor all its chunks.
    assert sum(kept) < 100 * generated.numel() < patches**2
    assert max(kept) <= generated.numel()
    loss.backward()
    assert torch.isfinite(generated.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [4, 100])
def test_constant_and_repeated_patches_have_finite_losses_and_gradients(dtype, chunk):
    varied = random_features(1, 4, 4, 4, dtype=dtype)
    constant = torch.full((1, 4, 4, 4), 0.7, dtype=dtype)
    half = torch.cat([varied[:, :, :2], varied[:, :, :2]], dim=2)
    zero = torch.zeros(1, 4, 4, 4, dtype=dtype)
    at_the_mean = varied.mean(dim=(2, 3), keepdim=True).expand_as(varied)
    for x in (varied, constant, half, zero, at_the_mean, varied * 1e-20, varied * 1e15):
        for y in (varied, constant, half, zero):
            generated, reference = x.clone().requires_grad_(), y.clone().requires_grad_()
            loss = contextual_loss(generated, reference, bandwidth=0.1, chunk=chunk)
            loss.backward()
            assert torch.isfinite(loss)
            assert -2e-5 <= loss.item() <= math.log(16) + 1e-6  # CX is at least 1 / patches
            assert torch.isfinite(generated.grad).all()
            assert torch.isfinite(reference.grad).all()


def test_following_the_gradient_lowers_the_loss():
    generated = (0.1 * random_features(1, 3, 4, 4)).requires_grad_()
    reference = random_features(1, 3, 4, 4, seed=1)
    optimizer = torch.optim.Adam([generated], lr=0.05)
    start = contextual_loss(generated, reference).item()
    for _ in range(100):
        optimizer.zero_grad()
        loss = contextual_loss(generated, reference)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * start


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_features_that_are_not_finite_are_named(features, bad):
    x, y = features
    broken = x.clone()
    broken[0, 3, 1, 2] = bad
    with pytest.raises(FloatingPointError, match=r"1 of 128 generated features \(1, 8, 4, 4\) are NaN or infinite"):
        contextual_loss(broken, y)
    with pytest.raises(FloatingPointError, match="1 of 128 reference features"):
        contextual_loss(x, broken)


def test_autocast_does_not_change_the_value():
    generated = random_features(1, 6, 6, 6, dtype=torch.float32).requires_grad_()
    reference = random_features(1, 6, 6, 6, seed=1, dtype=torch.float32)
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = contextual_loss(generated, reference, chunk=7)
        assert loss.dtype == torch.float32
        gradients.append((loss.detach(), *torch.autograd.grad(loss, generated)))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)
    halves = contextual_loss(generated.bfloat16(), reference.bfloat16())
    assert halves.dtype == torch.float32


def test_wrong_arguments_are_named(features):
    x, y = features
    with pytest.raises(ValueError, match=r"\(1, 8, 4, 4\) and \(1, 7, 4, 4\)"):
        contextual_loss(x, y[:, :7])
    with pytest.raises(ValueError, match=r"\(2, 8, 4, 4\)"):
        contextual_loss(x, y.repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match=r"\(1, 8\)"):
        contextual_loss(x[:, :, 0, 0], y)
    with pytest.raises(ValueError, match="no features"):
        contextual_loss(x[:, :, :0], y)
    with pytest.raises(ValueError, match="bandwidth"):
        contextual_loss(x, y, bandwidth=0.0)
    with pytest.raises(ValueError, match="chunk"):
        contextual_loss(x, y, chunk=0)
