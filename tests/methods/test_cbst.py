"""CBST: rounds, thresholds, and its step against a loop by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from engine import toy
from methods.hand_loop import assert_same_parameters, by_hand, trained

from medkd.losses.segmentation import dice_ce_loss
from medkd.methods.cbst import CBST


def test_the_share_grows_by_round_up_to_its_limit():
    built = toy.method(CBST, rounds=6)
    assert [built.portion_of(k) for k in range(6)] == pytest.approx([0.3, 0.35, 0.4, 0.45, 0.5, 0.5])


def test_a_round_keeps_the_share_of_every_class():
    built = toy.method(CBST, norm=True, portion=0.4)
    images = torch.randn(6, 1, 8, 8)
    built.recent.add(images)
    built.train()
    built.begin_round(0, 4, torch.device("cpu"))
    p = built.labeler(images).softmax(1).detach()
    for index in p.argmax(1).unique().tolist():
        confidence = p.max(1).values[p.argmax(1) == index]
        kept = (confidence > built.thresholds.value[index]).sum().item()
        assert kept == int(0.4 * len(confidence) + 1e-9)


def test_steps_equal_a_hand_written_loop():
    arguments = {"rounds": 2, "start_frac": 0.25, "portion": 0.5, "portion_step": 0.2, "largest_portion": 0.7}
    built = trained(toy.method(CBST, **arguments), 8)
    student = toy.network()
    state: dict[str, object] = {"images": []}

    def losses(batch, progress, generator):
        share = {0.25: 0.5, 0.625: 0.7}.get(progress)  # the two rounds begin at 2/8 and 5/8 of the run
        if share is not None:
            labeler = copy.deepcopy(student)
            p = labeler(torch.cat(state["images"])).softmax(1).detach().numpy()
            best, confidence = p.argmax(1), p.max(1)
            limits = np.ones(toy.CLASSES, np.float32)
            for index in range(toy.CLASSES):
                ordered = np.sort(confidence[best == index])[::-1]
                if len(ordered):
                    limits[index] = ordered[int(share * len(ordered) + 1e-9)]
            state.update(labeler=labeler, limits=torch.from_numpy(limits))
        loss = dice_ce_loss(student(batch["source"]["image"]), batch["source"]["label"])
        if "labeler" in state:
            target = batch["target"]["image"]
            ratio = state["labeler"](target).softmax(1).detach() / state["limits"].reshape(1, -1, 1, 1)
            label = torch.where(ratio.max(1).values > 1, ratio.argmax(1), -100)
            loss = loss + torch.nn.functional.cross_entropy(student(target), label)
        return {"student": loss}

    by_hand(CBST, {"student": student}, 8, losses, lambda batch, step: state["images"].append(batch["target"]["image"]))
    assert_same_parameters(built.student, student)
    assert int(built.round) == 1
