"""RandConv: random versions, consistency, and its step against a loop by hand."""

from __future__ import annotations

import math

import pytest
import torch
from engine import toy
from methods.hand_loop import assert_same_parameters, by_hand, trained

from medkd.losses.segmentation import dice_ce_loss
from medkd.methods.random_convolution import RandomConvolution, jensen_shannon


def test_it_asks_for_no_target():
    assert RandomConvolution.streams == ("source",)
    assert not RandomConvolution.optional_streams


def test_agreeing_predictions_diverge_by_nothing_and_opposite_ones_by_log_two():
    logits = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert jensen_shannon([logits, logits, logits]).item() == pytest.approx(0, abs=1e-12)
    one, other = torch.tensor([[50.0, -50.0]]), torch.tensor([[-50.0, 50.0]])
    assert jensen_shannon([one, other]).item() == pytest.approx(math.log(2), rel=1e-5)


def test_the_divergence_has_the_right_gradient():
    logits = [torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *z: jensen_shannon(z), logits)


@pytest.mark.parametrize("shape", [(2, 1, 9, 8), (2, 2, 5, 6, 7)])
def test_versions_keep_the_shape_and_differ(shape):
    built = toy.method(RandomConvolution)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(shape)
    versions = [built.randomized(image, generator) for _ in range(4)]
    assert all(version.shape == image.shape for version in versions)
    assert not any(torch.equal(version, versions[0]) for version in versions[1:])


def test_a_kernel_of_one_pixel_scales_the_image():
    built = toy.method(RandomConvolution, kernel_sizes=(1,))
    image = torch.randn(2, 1, 8, 8)
    ratio = built.randomized(image, torch.Generator().manual_seed(1)) / image
    torch.testing.assert_close(ratio, ratio[0, 0, 0, 0].expand_as(ratio))


def test_random_images_keep_their_size_on_average():
    """Weights have variance 1 / (C k²), so white noise keeps its variance when alpha is 1."""
    built = toy.method(RandomConvolution, kernel_sizes=(5,))
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, 32, 32)
    variances = []
    for _ in range(200):
        version = built.randomized(image, generator)
        variances.append(version.var())
    # E[(1 - a)² + a²] = 2/3 for uniform alpha and independent parts.
    assert torch.stack(variances).mean().item() == pytest.approx(2 / 3, rel=0.15)


def test_with_identity_images_pass_unchanged():
    built = toy.method(RandomConvolution, identity_prob=1.0)
    image = torch.randn(2, 1, 8, 8)
    assert torch.equal(built.randomized(image, torch.Generator()), image)


def test_even_kernels_are_refused():
    with pytest.raises(ValueError, match="odd"):
        toy.method(RandomConvolution, kernel_sizes=(3, 4))


def test_steps_equal_a_hand_written_loop():
    built = trained(toy.method(RandomConvolution), 3)
    student = toy.network()
    versions_of = toy.method(RandomConvolution).randomized

    def losses(batch, progress, generator):
        source = batch["source"]
        logits = [student(versions_of(source["image"], generator)) for _ in range(3)]
        p = [z.softmax(1) for z in logits]
        mean = (p[0] + p[1] + p[2]) / 3
        divergence = sum((q * (q / mean).log()).sum(1).mean() for q in p) / 3
        return {"student": dice_ce_loss(logits[0], source["label"]) + 10 * divergence}

    by_hand(RandomConvolution, {"student": student}, 3, losses)
    assert_same_parameters(built.student, student, atol=1e-5)


def test_without_consistency_one_version_is_made():
    seen = []
    built = toy.method(RandomConvolution, consistency_weight=0.0)
    built.student.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    trained(built, 2)
    assert seen == [2, 2]
