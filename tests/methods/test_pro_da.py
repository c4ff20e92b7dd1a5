"""ProDA: prototypes, corrected pseudo-labels, and its step against a loop by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from engine import toy
from methods.hand_loop import assert_same_parameters, by_hand, trained
from torch import nn

from medkd.errors import ConfigError
from medkd.losses.pseudo_labels import prototype_weights
from medkd.losses.segmentation import dice_ce_loss
from medkd.methods.pro_da import ProDA, log_assignment
from medkd.nets.strong_intensity import strong_intensity


def test_assignments_agree_with_prototype_weights():
    features, prototypes = torch.randn(2, 5, 4, 3), torch.randn(3, 5)
    for tau in (0.5, 1.0):
        weights = prototype_weights(features, prototypes, tau)
        torch.testing.assert_close(log_assignment(features, prototypes, tau).exp(), weights)


def test_a_class_without_prototype_is_never_assigned_and_gives_no_nan():
    features = torch.randn(2, 5, 4, 3, requires_grad=True)
    prototypes = torch.randn(3, 5)
    prototypes[1] = torch.inf
    found = log_assignment(features, prototypes)
    assert found.exp()[:, 1].max() == 0
    found[:, [0, 2]].sum().backward()
    assert features.grad.isfinite().all()


def test_a_prototype_is_the_mean_feature_of_what_is_predicted_as_its_class():
    built = toy.method(ProDA).train()
    images = torch.randn(6, 1, 8, 8)
    built.recent.add(images)
    built.begin(4, torch.device("cpu"))
    features = built.labeler[:-1](images)
    predicted = built.labeler(images).argmax(1)
    for index in predicted.unique().tolist():
        mean = features.movedim(1, -1)[predicted == index].mean(0)
        torch.testing.assert_close(built.prototypes.value[index], mean, atol=1e-5, rtol=1e-4)


def test_prototypes_follow_the_teacher_slowly_and_absent_classes_stay():
    built = toy.method(ProDA, prototype_momentum=0.25)
    built.prototypes.value = torch.tensor([[1.0, 1.0], [2.0, 2.0], [torch.inf, torch.inf]])
    features = torch.tensor([[3.0, 5.0], [7.0, 7.0]]).reshape(1, 2, 2)  # (1, D=2, 2 positions)
    logits = torch.tensor([[9.0, 0.0], [0.0, 0.0], [0.0, 9.0]]).reshape(1, 3, 2)
    built.move_prototypes(logits, features)
    expected = torch.tensor([[1 + 0.25 * 2, 1 + 0.25 * 6], [2.0, 2.0], [5.0, 7.0]])
    torch.testing.assert_close(built.prototypes.value, expected)


def test_steps_equal_a_hand_written_loop():
    steps = 5
    built = trained(toy.method(ProDA, start_frac=0.3, decay=0.9, prototype_momentum=0.1), steps)
    student = toy.network()
    state: dict[str, object] = {"images": []}

    def features_of(network, image):
        return network[:-1](image)

    def distances(features, prototypes):
        far = torch.full_like(features[:, 0], 1e4)  # a class without prototype
        return torch.stack(
            [far if p.isinf().any() else (features - p.reshape(1, -1, 1, 1)).norm(dim=1) for p in prototypes], 1
        )

    def losses(batch, progress, generator):
        loss = dice_ce_loss(student(batch["source"]["image"]), batch["source"]["label"])
        target = batch["target"]["image"]
        if progress >= 0.3 and "labeler" not in state:
            labeler, images = copy.deepcopy(student), torch.cat(state["images"])
            features, best = features_of(labeler, images).detach(), labeler(images).argmax(1)
            means = [features.movedim(1, -1)[best == c].mean(0).nan_to_num(torch.inf) for c in range(toy.CLASSES)]
            state.update(labeler=labeler, teacher=copy.deepcopy(student), prototypes=torch.stack(means))
        if "labeler" not in state:
            state["images"].append(target)
            return {"student": loss}
        prototypes, teacher = state["prototypes"], state["teacher"]
        weak = features_of(teacher, target).detach()
        assignment = torch.softmax(-distances(weak, prototypes), 1)
        label = (assignment * state["labeler"](target).softmax(1).detach()).argmax(1)
        strong = strong_intensity(target, generator)
        logits = student(strong)
        p, log_p = logits.softmax(1), logits.log_softmax(1)
        one_hot = torch.nn.functional.one_hot(label, toy.CLASSES).movedim(-1, 1).float()
        cross = -(one_hot * log_p).sum(1).mean()
        reverse = -(p * one_hot.clamp(1e-4, 1).log()).sum(1).mean()
        ours = torch.log_softmax(-distances(features_of(student, strong), prototypes), 1)
        consistency = (torch.xlogy(assignment, assignment) - assignment * ours).mean()
        regularizer = -log_p.mean() - np.log(toy.CLASSES)
        best = teacher(target).argmax(1)
        for c in best.unique().tolist():
            mean = weak.movedim(1, -1)[best == c].mean(0)
            prototypes[c] = mean if prototypes[c].isinf().any() else 0.9 * prototypes[c] + 0.1 * mean
        return {"student": loss + 0.1 * cross + reverse + 10 * consistency + 0.1 * regularizer}

    def after(batch, step):
        if "teacher" in state:
            with torch.no_grad():
                for average, parameter in zip(state["teacher"].parameters(), student.parameters(), strict=True):
                    average.copy_(0.9 * average + 0.1 * parameter)

    by_hand(ProDA, {"student": student}, steps, losses, after)
    assert "labeler" in state
    assert_same_parameters(built.student, student, atol=1e-5)
    assert_same_parameters(built.teacher, state["teacher"], atol=1e-5)
    torch.testing.assert_close(built.prototypes.value, state["prototypes"], atol=1e-4, rtol=1e-4)


def test_the_soft_labels_stay_those_of_the_beginning():
    built = trained(toy.method(ProDA, start_frac=0.2), 3)
    at_start = {name: value.clone() for name, value in built.labeler.state_dict().items()}
    longer = trained(toy.method(ProDA, start_frac=0.1), 6)
    assert not toy.same_state(longer.labeler, longer.student)
    assert all(torch.equal(value, built.labeler.state_dict()[name]) for name, value in at_start.items())


def test_the_classifier_is_found_or_named():
    assert toy.method(ProDA).classifier == "2"
    with pytest.raises(ConfigError, match="no module 'head'"):
        toy.method(ProDA, classifier="head")
    with pytest.raises(ConfigError, match="no convolution"):
        ProDA(nn.Linear(3, 3))


def test_a_classifier_of_another_resolution_is_refused():
    coarse = nn.Sequential(nn.Conv2d(1, 3, 2, stride=2), nn.ReLU(), nn.ConvTranspose2d(3, 3, 2, stride=2))
    with pytest.raises(ConfigError, match="same resolution"):
        trained(ProDA(coarse, start_frac=0.1), 3)


def test_hooks_are_removed():
    built = trained(toy.method(ProDA), 3)
    for network in (built.student, built.teacher, built.labeler):
        assert not [module for module in network.modules() if module._forward_pre_hooks or module._forward_hooks]
