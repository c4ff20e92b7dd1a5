"""DACS: ClassMix, confidence weight, teacher, and its step against a loop by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from engine import toy
from methods.hand_loop import assert_same_parameters, by_hand, trained

from medkd.losses.mixing import class_mix_mask, paste
from medkd.losses.segmentation import dice_ce_loss
from medkd.methods.dacs import DACS
from medkd.nets.strong_intensity import strong_intensity


def test_class_mix_conserves_pixels():
    """Every pixel of the mix is the source's where the mask is set and else the target's, label and image alike."""
    generator = torch.Generator().manual_seed(3)
    source, target = torch.randn(5, 1, 8, 8), torch.randn(5, 1, 8, 8)
    label, pseudo = torch.randint(4, (5, 1, 8, 8)), torch.randint(4, (5, 1, 8, 8))
    mask = class_mix_mask(label, generator)
    image, mixed = paste(mask, source, target), paste(mask, label, pseudo)
    assert torch.equal(image[mask], source[mask])
    assert torch.equal(image[~mask], target[~mask])
    assert torch.equal(mixed[mask], label[mask])
    assert torch.equal(mixed[~mask], pseudo[~mask])
    for one_mask, one_label in zip(mask, label, strict=True):
        pasted = one_label[one_mask].unique()
        assert len(pasted) == 2  # half of the four classes, whole
        assert one_mask.sum() == torch.isin(one_label, pasted).sum()


def test_steps_equal_a_hand_written_loop():
    built = trained(toy.method(DACS, norm=True, confidence=0.4), 4)
    student = toy.network(norm=True)
    teacher = copy.deepcopy(student)

    def losses(batch, progress, generator):
        image, label, target = batch["source"]["image"], batch["source"]["label"], batch["target"]["image"]
        with torch.no_grad():
            confidence, pseudo = teacher(target).softmax(1).max(1)
        share = (confidence >= 0.4).float().mean((1, 2))
        mask = class_mix_mask(label, generator)
        mixed = strong_intensity(torch.where(mask, image, target), generator)
        mixed_label = torch.where(mask, label, pseudo[:, None])[:, 0]
        weight = torch.where(mask[:, 0], torch.ones(()), share[:, None, None].expand_as(pseudo))
        per_pixel = torch.nn.functional.cross_entropy(student(mixed), mixed_label, reduction="none")
        return {"student": dice_ce_loss(student(image), label) + (weight * per_pixel).mean()}

    def after(batch, step):
        decay = min(1 - 1 / (step + 1), 0.99)
        with torch.no_grad():
            for average, parameter in zip(teacher.parameters(), student.parameters(), strict=True):
                average.copy_(decay * average + (1 - decay) * parameter)
            for average, buffer in zip(teacher.buffers(), student.buffers(), strict=True):
                average.copy_(buffer)

    by_hand(DACS, {"student": student}, 4, losses, after)
    assert_same_parameters(built.student, student)
    assert_same_parameters(built.teacher, teacher)


def test_a_teacher_that_is_never_sure_leaves_source_pixels_alone_in_the_mixed_term():
    built = toy.method(DACS, confidence=1.1)
    batch = next(iter(toy.streams(DACS)))
    from medkd.engine import StepContext

    context = StepContext(torch.device("cpu"), 1, 1, 0.0, torch.Generator().manual_seed(0))
    assert built.losses(batch, context)["confident_share"] == 0


def test_the_teacher_can_be_deployed():
    built = toy.method(DACS, deploy_teacher=True)
    assert built.deployed is built.teacher


def test_strength_zero_changes_nothing():
    image = torch.randn(2, 1, 8, 8)
    assert torch.equal(strong_intensity(image, torch.Generator(), strength=0.0), image)
    with pytest.raises(ValueError, match="strength"):
        strong_intensity(image, torch.Generator(), strength=2.0)


@pytest.mark.parametrize("shape", [(6, 1, 9, 8), (6, 2, 5, 6, 7)])
def test_images_are_augmented_each_on_its_own_and_constants_stay_flat(shape):
    image = torch.full(shape, 0.3)
    changed = strong_intensity(image, torch.Generator().manual_seed(0))
    assert changed.shape == image.shape
    torch.testing.assert_close(changed, changed.flatten(1)[:, :1].reshape(-1, *[1] * (len(shape) - 1)).expand(shape))
    assert len(changed.flatten(1)[:, 0].unique()) > 2
    assert (changed - 0.3).abs().max() <= 0.25 + 1e-6
