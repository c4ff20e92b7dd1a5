"""SHOT: frozen classifier, centroids, and its step against a loop by hand."""

from __future__ import annotations

import copy

import numpy as np
import torch
from engine import toy
from methods.hand_loop import assert_same_parameters, by_hand, trained

from medkd.methods.shot import SHOT


def centroids_by_numpy(features: np.ndarray, p: np.ndarray) -> np.ndarray:
    """The release's obtain_label up to its last centroids: soft ones, labels, the labels' own centroids."""
    rows = np.concatenate([features, np.ones((len(features), 1))], 1)
    rows = (rows.T / np.linalg.norm(rows, axis=1)).T
    counts = np.bincount(p.argmax(1), minlength=p.shape[1])
    soft = p.T @ rows / (1e-8 + p.sum(0)[:, None])
    similarity = rows @ (soft.T / np.linalg.norm(soft, axis=1))
    similarity[:, counts == 0] = -np.inf
    hard = np.eye(p.shape[1])[similarity.argmax(1)]
    return hard.T @ rows / (1e-8 + hard.sum(0)[:, None])


def test_the_classifier_is_frozen_and_the_rest_is_trained():
    fresh, built = toy.method(SHOT), trained(toy.method(SHOT), 4)
    assert torch.equal(fresh.student[-1].weight, built.student[-1].weight)
    assert torch.equal(fresh.student[-1].bias, built.student[-1].bias)
    assert not torch.equal(fresh.student[0].weight, built.student[0].weight)
    assert len(built.role_parameters("student")) == 2


def test_it_asks_for_no_source():
    assert SHOT.streams == ("target",)
    assert not SHOT.optional_streams


def test_steps_equal_a_hand_written_loop():
    steps = 6
    built = trained(toy.method(SHOT, refreshes=2, voxels_per_image=64), steps)
    student = toy.network()
    student[-1].requires_grad_(False)
    state: dict[str, object] = {"images": []}

    def losses(batch, progress, generator):
        target = batch["target"]["image"]
        if progress == 0.5:  # the second of two intervals begins; all 64 voxels of an image are sampled
            labeler, images = copy.deepcopy(student), torch.cat(state["images"])
            features = labeler[:-1](images).detach().movedim(1, -1).reshape(-1, 4).double().numpy()
            p = labeler(images).softmax(1).detach().movedim(1, -1).reshape(-1, toy.CLASSES).double().numpy()
            state.update(labeler=labeler, centroids=centroids_by_numpy(features, p))
        logits = student(target)
        p = logits.softmax(1)
        mean = p.mean((0, 2, 3))
        loss = -(p * p.log()).sum(1).mean() + (mean * mean.log()).sum()
        if "labeler" in state:
            rows = state["labeler"][:-1](target).detach().movedim(1, -1).double().numpy()
            rows = np.concatenate([rows, np.ones((*rows.shape[:-1], 1))], -1)
            rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
            centroids = state["centroids"]
            lengths = np.linalg.norm(centroids, axis=1)
            similarity = rows @ (centroids / np.maximum(lengths, 1e-12)[:, None]).T
            similarity[..., lengths == 0] = -np.inf
            label = torch.from_numpy(similarity.argmax(-1))
            loss = loss + 0.3 * torch.nn.functional.cross_entropy(logits, label)
        return {"student": loss}

    by_hand(SHOT, {"student": student}, steps, losses, lambda b, step: state["images"].append(b["target"]["image"]))
    assert "labeler" in state
    assert_same_parameters(built.student, student)


def test_labels_hold_between_refreshes():
    built = trained(toy.method(SHOT, refreshes=2), 6)
    image = torch.randn(2, 1, 8, 8)
    label = built.pseudo_label(image)
    with torch.no_grad():
        for parameter in built.student.parameters():
            parameter.normal_()
    assert torch.equal(built.pseudo_label(image), label)
    assert label.shape == (2, 8, 8)


def test_without_the_pseudo_label_term_nothing_is_remembered():
    built = trained(toy.method(SHOT, pseudo_weight=0.0), 4)
    assert not len(built.recent)
    assert not built.centroids.is_set


def test_a_class_that_is_never_predicted_is_never_a_pseudo_label():
    built = toy.method(SHOT, minimum_count=0)
    with torch.no_grad():
        built.student[-1].bias[1] = -1e3
    built.recent.add(torch.randn(4, 1, 8, 8))
    built.train()
    built.refresh(2, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert not (built.pseudo_label(torch.randn(8, 1, 8, 8)) == 1).any()
