"""The baselines of unsupervised domain adaptation at equal steps, with the control that unmasks most gains.

    python benchmarks/uda.py                    the embedded two-contrast demo, T1 to T2
    python benchmarks/uda.py --task ibsi_sts    real MR to CT, tumor

Every arm of a seed starts from one student, trained on the labeled source for the first half of the steps, and trains
for the second half in its own way:

- source_only: as before. zero_loss_target: as before, and each step also runs a target batch through the student, with
  zero loss: what BatchNorm's statistics alone bring. random_convolution: domain generalization, never sees the target.
- bn_adaptation, tent, tent_online: the network of source_only, adapted to each test volume while predicting it.
- fda, adapt_seg_net, min_ent, adv_ent, mean_teacher, cbst, dacs, pro_da: source with labels, target without.
- shot: target without labels only.
- target_supervised: the bound; both halves on the labels of the target's training patients.

Settings are the papers' defaults, but for what the summary lists.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from monai.networks.nets import UNet
from torch import nn
from two_domains import Predictor, Task, as_predictor, fit, items, main

from medkd.engine import Method, StepContext
from medkd.engine.method import Batch
from medkd.losses.segmentation import dice_ce_loss
from medkd.methods.adapt_seg_net import AdaptSegNet
from medkd.methods.advent import AdvEnt, MinEnt
from medkd.methods.cbst import CBST
from medkd.methods.dacs import DACS
from medkd.methods.fda import FDA
from medkd.methods.mean_teacher import MeanTeacher
from medkd.methods.pro_da import ProDA
from medkd.methods.random_convolution import RandomConvolution
from medkd.methods.shot import SHOT
from medkd.methods.supervised import Supervised
from medkd.methods.tent import VolumeAdapter, adapt_batch_norm
from medkd.nets.critics import OutputCritic

Trained = tuple[Predictor, dict[str, Any]]
BATCH_SIZE = 8
FEATURES = 16
SHOT_RATE = 2e-4
WEIGHT = 0.001  # of the adversarial and entropy terms, the papers'
TITLES = {
    "source_only": "source only",
    "zero_loss_target": "control: source + target forward pass, zero loss",
    "bn_adaptation": "BN adaptation (test time)",
    "tent": "TENT (test time, reset per volume)",
    "tent_online": "TENT (test time, online)",
    "random_convolution": "RandConv (never sees the target)",
    "fda": "FDA",
    "adapt_seg_net": "AdaptSegNet",
    "min_ent": "MinEnt",
    "adv_ent": "AdvEnt",
    "mean_teacher": "mean teacher",
    "cbst": "CBST",
    "dacs": "DACS",
    "pro_da": "ProDA, stage 1",
    "shot": "SHOT (source-free)",
    "target_supervised": "bound: target labels",
}
NOTES = (
    "The control separates what a method's objective brings from what BatchNorm's statistics bring by themselves: an "
    "arm that is better than source only but not than the control has shown no more than the latter. Entropy is lowest "
    "where all is one class, so arms that minimize it (MinEnt, AdvEnt, TENT, SHOT) can lose the rarer classes: read "
    "the Dice of each class."
)


class ZeroLossTarget(Method):
    """The control: L = L_seg(source); target images only pass through the student."""

    paper: ClassVar[str] = "a control"
    streams: ClassVar[tuple[str, ...]] = ("source", "target")
    batch_coupled: ClassVar[bool] = True

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def losses(self, batch: Batch, ctx: StepContext) -> dict[str, torch.Tensor]:
        """The supervised term."""
        source = batch["source"]
        logits = self.student(source["image"])
        with torch.no_grad():
            self.student(batch["target"]["image"])
        return {"segmentation_loss": dice_ce_loss(logits, source["label"])}


def student(task: Task) -> nn.Module:
    """MONAI's UNet with BatchNorm, and a 1 × 1 classifier of its own, whose input SHOT and ProDA need as features."""
    body = UNet(2, 1, FEATURES, (16, 32, 64), (2, 2), norm="batch")
    return nn.Sequential(body, nn.BatchNorm2d(FEATURES), nn.ReLU(), nn.Conv2d(FEATURES, task.classes, 1))


def critic(task: Task) -> nn.Module:
    """AdaptSegNet's critic, a quarter as wide and one layer shorter, for crops of 64 px."""
    return OutputCritic(task.classes, 16, layers=3)


def slice_by_slice(network: nn.Module, logits_of: Callable[[torch.Tensor], torch.Tensor]) -> Predictor:
    """A predictor that hands a whole volume's slices, padded with -1 to multiples of 4 px, to ``logits_of``."""
    device = next(network.parameters()).device

    def predict(slices: torch.Tensor) -> np.ndarray:
        high, wide = (-size % 4 for size in slices.shape[2:])
        padded = nn.functional.pad(slices, (0, wide, 0, high), value=-1.0).to(device)
        labels: np.ndarray = logits_of(padded)[..., : slices.shape[2], : slices.shape[3]].argmax(1).cpu().numpy()
        return labels

    return predict


def arms(task: Task, seed: int, steps: int) -> Iterator[tuple[str, Callable[[], Trained]]]:
    """The arms of one seed."""
    labeled = items(task.source.labeled, labels=True)
    unlabeled = items(task.target.unlabeled, labels=False)
    both = {"source": labeled, "target": unlabeled}
    first, second = steps // 2, steps - steps // 2

    @cache
    def started() -> nn.Module:
        torch.manual_seed(2000 + seed)
        network = student(task)
        fit(Supervised(network), {"labeled": labeled}, task=task, steps=first, seed=seed, batch_size=BATCH_SIZE)
        return network

    def trained(method: Method, streams: dict[str, list[Any]], **settings: Any) -> Trained:
        facts = fit(method, streams, task=task, steps=second, seed=seed + 500, batch_size=BATCH_SIZE, **settings)
        return as_predictor(method.deployed), facts

    @cache
    def source_only_network() -> tuple[nn.Module, dict[str, Any]]:
        network = copy.deepcopy(started())
        _, facts = trained(Supervised(network), {"labeled": labeled})
        return network.eval(), dict(facts)

    def at_test_time(make: Callable[[nn.Module], Callable[[torch.Tensor], torch.Tensor]]) -> Trained:
        network = source_only_network()[0]
        return slice_by_slice(network, make(network)), {}

    def adapted(make: Callable[[nn.Module], Method], **settings: Any) -> Callable[[], Trained]:
        return lambda: trained(make(copy.deepcopy(started())), both, **settings)

    def target_supervised() -> Trained:
        torch.manual_seed(2000 + seed)
        network = student(task)
        bound = {"labeled": items(task.target.unlabeled, labels=True)}
        fit(Supervised(network), bound, task=task, steps=first, seed=seed, batch_size=BATCH_SIZE)
        return trained(Supervised(network), bound)

    adversarial: dict[str, Any] = {
        "rates": {"student": 2e-3, "critics": 1e-4}, "betas": {"critics": (0.9, 0.99)},
    }  # fmt: skip
    yield "source_only", lambda: (as_predictor(source_only_network()[0]), source_only_network()[1])
    yield "zero_loss_target", adapted(ZeroLossTarget)
    yield "bn_adaptation", lambda: at_test_time(lambda net: lambda slices: adapt_batch_norm(net, slices))
    yield "tent", lambda: at_test_time(VolumeAdapter)
    yield "tent_online", lambda: at_test_time(lambda net: VolumeAdapter(net, reset_per_volume=False))
    yield "random_convolution", lambda: trained(RandomConvolution(copy.deepcopy(started())), {"source": labeled})
    yield "fda", adapted(lambda net: FDA(net, beta=0.05))
    yield "adapt_seg_net", adapted(lambda net: AdaptSegNet(net, critic(task), adversarial_weight=WEIGHT), **adversarial)
    yield "min_ent", adapted(lambda net: MinEnt(net, entropy_weight=WEIGHT))
    yield "adv_ent", adapted(lambda net: AdvEnt(net, critic(task), adversarial_weight=WEIGHT), **adversarial)
    yield (
        "mean_teacher",
        lambda: trained(MeanTeacher(copy.deepcopy(started())), {"labeled": labeled, "unlabeled": unlabeled}),
    )
    yield "cbst", adapted(CBST)
    yield "dacs", adapted(DACS)
    yield "pro_da", adapted(lambda net: ProDA(net, decay=0.99))
    yield "shot", lambda: trained(SHOT(copy.deepcopy(started())), {"target": unlabeled}, rates=SHOT_RATE)
    yield "target_supervised", target_supervised


FACTS = {
    "Student": "MONAI UNet, channels 16, 32, 64, BatchNorm, and a 1 × 1 classifier; the first half of the steps, on "
    "the labeled source, is shared by all arms of a seed",
    "Optimizer": f"Adam 2e-3 (SHOT {SHOT_RATE:g}, critics 1e-4), poly decay, batches of {BATCH_SIZE} per stream",
    "Not the papers' defaults": "FDA beta 0.05 (0.01 exchanges the mean alone at this size), "
    "ProDA teacher decay 0.99 (0.999), a smaller critic, steps and rates",
}
OTHERS = [arm for arm in TITLES if arm not in ("source_only", "zero_loss_target", "target_supervised")]
PAIRS = [
    ("zero_loss_target", "source_only"),
    *[(arm, "source_only") for arm in OTHERS],
    *[(arm, "zero_loss_target") for arm in OTHERS],
    *[("target_supervised", arm) for arm in ("source_only", "zero_loss_target")],
]


if __name__ == "__main__":
    main(
        "uda",
        arms,
        heading="UDA baselines",
        pairs=PAIRS,
        titles=TITLES,
        seeds={"demo": 5, "ibsi_sts": 3},
        steps={"demo": 300, "ibsi_sts": 300},
        facts=FACTS,
        notes=NOTES,
        description=__doc__,
    )
