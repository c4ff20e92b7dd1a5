"""FDA: style exchange and its step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine import toy
from methods.hand_loop import assert_same_parameters, by_hand, trained

from medkd.losses.segmentation import dice_ce_loss
from medkd.methods.fda import FDA


def swapped_by_numpy(source: np.ndarray, target: np.ndarray, beta: float) -> np.ndarray:
    """The release's order of operations: shifted spectra, a centered symmetric square."""
    out = np.empty_like(source)
    high, wide = source.shape[-2:]
    half = int(np.floor(min(high, wide) * beta))
    rows, columns = (slice(size // 2 - half, size // 2 + half + 1) for size in (high, wide))
    for index in np.ndindex(source.shape[:2]):
        ours, theirs = np.fft.fft2(source[index]), np.fft.fft2(target[index])
        amplitude = np.fft.fftshift(np.abs(ours))
        amplitude[rows, columns] = np.fft.fftshift(np.abs(theirs))[rows, columns]
        out[index] = np.fft.ifft2(np.fft.ifftshift(amplitude) * np.exp(1j * np.angle(ours))).real
    return out


def test_an_image_in_its_own_style_is_itself():
    image = torch.rand(3, 1, 12, 10) * 2 - 1
    for beta in (0.0, 0.01, 0.2, 0.5):
        method = toy.method(FDA, beta=beta)
        torch.testing.assert_close(method.in_target_style(image, image), image, atol=1e-5, rtol=0)


def test_beta_zero_exchanges_the_mean_brightness_alone():
    source, target = torch.rand(2, 1, 8, 8) - 1, torch.rand(2, 1, 8, 8)
    styled = toy.method(FDA, beta=0.0).in_target_style(source, target)
    torch.testing.assert_close(styled.mean((2, 3)), target.mean((2, 3)))
    torch.testing.assert_close(styled - styled.mean((2, 3), keepdim=True), source - source.mean((2, 3), keepdim=True))


def test_target_images_are_used_again_when_there_are_fewer():
    source, target = torch.rand(3, 1, 8, 8), torch.rand(2, 1, 8, 8)
    styled = toy.method(FDA, beta=0.0).in_target_style(source, target)
    torch.testing.assert_close(styled.mean((1, 2, 3)), target.mean((1, 2, 3))[[0, 1, 0]])


def test_steps_equal_a_hand_written_loop():
    built = trained(toy.method(FDA, beta=0.2), 4)
    student = toy.network()

    def losses(batch, progress, generator):
        source, target = batch["source"], batch["target"]["image"]
        styled = swapped_by_numpy(source["image"].double().numpy() + 1, target.double().numpy() + 1, 0.2) - 1
        logits = student(torch.from_numpy(styled).float())
        loss = dice_ce_loss(logits, source["label"])
        if progress >= 0.5:
            p = torch.softmax(student(target), dim=1)
            entropy = -(p * p.log()).sum(dim=1) / np.log(toy.CLASSES)
            loss = loss + 0.005 * ((entropy**2 + 1e-8) ** 2.0).mean()
        return {"student": loss}

    by_hand(FDA, {"student": student}, 4, losses)
    assert_same_parameters(built.student, student)


@pytest.mark.parametrize(("progress", "weight"), [(0.49, 0.0), (0.5, 1.0)])
def test_the_entropy_term_waits_for_its_start(progress, weight):
    from medkd.engine import StepContext

    built = toy.method(FDA, entropy_weight=1.0)
    batch = next(iter(toy.streams(FDA)))
    context = StepContext(torch.device("cpu"), 1, 1, progress, torch.Generator())
    assert (built.losses(batch, context)["entropy_loss"] > 0) == bool(weight)
