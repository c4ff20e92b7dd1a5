"""MT-UDA and LE-UDA against their parts, and how few source labels they need; all arms at equal steps and data.

    python benchmarks/le_uda.py --task demo                      the embedded virtual patients in two contrasts
    python benchmarks/le_uda.py --task ibsi_sts --data DIR       real CT and MR
    python benchmarks/le_uda.py --task demo --report             only summarize the seeds already computed

Arms, all with the same student, initial weights, labeled volumes, batch size, optimizer and steps. One CycleGAN per
seed serves all that translate:

- source_only: labeled source images; tested on target images as they are.
- translated_training: labeled source images translated to target style; tested on target images as they are.
- translated_test: source_only's network, tested on target images translated to source style.
- zero_loss: MT-UDA's step with both consistency weights 0: labeled images and their cycles, and every unlabeled image
  goes through the student with no loss, so that BatchNorm sees it. Tested, as all that follow, in source style.
- mt_uda_without_inter, mt_uda_without_intra, mt_uda, le_uda.
- target_bound: labels of all target training volumes.

The demo has a sweep over 1, 2, 4 and 16 (all) labeled source volumes; elsewhere all labeled volumes are used. The same
source volumes stay in the unlabeled stream throughout.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache, cached_property, partial
from typing import Any

import torch
from monai.networks.nets import UNet
from torch import nn
from two_domains import Predictor, Scan, Task, as_predictor, fit, items, main, through

from medkd.engine import Method
from medkd.methods.cyclegan import CycleGAN
from medkd.methods.le_uda import LEUDA
from medkd.methods.mt_uda import MTUDA
from medkd.methods.supervised import Supervised
from medkd.nets.critics import FeatureCritic
from medkd.nets.translate_then_segment import TranslateThenSegment
from medkd.nets.translators import ResNetGenerator, patch_critic

STUDENT_RATE, CRITIC_RATE, GAN_RATE = 2e-3, 1e-4, 1e-3
BATCH_SIZE = 4
GAN_STEPS = {"demo": 400, "ibsi_sts": 400}
GAN_WIDTH, GAN_BLOCKS, GAN_BATCH_SIZE = 8, 2, 4
LAYERS = ("model.2", "model.1.submodule.2")  # the student's last decoder level and the one before
CONTROL = "zero_loss"
SWEEP = (*[(name, count) for count in (1, 2) for name in (CONTROL, "mt_uda", "le_uda")], (CONTROL, 16), ("le_uda", 16))
Trained = tuple[Predictor, dict[str, Any]]


class Seed:
    """What the arms of one seed share: a CycleGAN, its offline translations, and the student's first weights."""

    def __init__(self, task: Task, seed: int, steps: int) -> None:
        self.task, self.seed, self.steps = task, seed, steps
        torch.manual_seed(2000 + seed)
        self._student = UNet(2, 1, task.classes, (16, 32, 64), (2, 2), norm="batch")

    def student(self) -> nn.Module:
        """A fresh student with the seed's first weights."""
        return copy.deepcopy(self._student)

    @cached_property
    def translations(self) -> tuple[nn.ModuleDict, dict[str, Any]]:
        """The averaged generators of a CycleGAN trained on all training images of both domains, and facts."""
        torch.manual_seed(3000 + self.seed)
        names = ("to_target", "to_source")
        method = CycleGAN(
            # BatchNorm: instance norm's statistics of a whole test slice are not those of a training crop.
            nn.ModuleDict({k: ResNetGenerator(width=GAN_WIDTH, blocks=GAN_BLOCKS, norm="batch") for k in names}),
            nn.ModuleDict({k: patch_critic(width=16, layers=2) for k in ("source", "target")}),
            identity_weight=0.0,
            decay=0.99,
        )
        steps = GAN_STEPS[self.task.name]
        facts = fit(
            method,
            {
                "source": items(self.task.source.train, labels=False),
                "target": items(self.task.target.train, labels=False),
            },
            task=self.task, steps=steps, seed=self.seed, batch_size=GAN_BATCH_SIZE, rates=GAN_RATE,
            betas=dict.fromkeys(method.roles, (0.5, 0.999)),
        )  # fmt: skip
        return method.ema, {f"cyclegan_{name}": value for name, value in facts.items()}

    @property
    def to_target(self) -> nn.Module:
        """Source style → target style."""
        return self.translations[0]["to_target"]

    @property
    def to_source(self) -> nn.Module:
        """Target style → source style."""
        return self.translations[0]["to_source"]

    def labeled(self, count: int | None = None) -> list[Scan]:
        """The first ``count`` labeled source volumes; all that have labels beyond those meant to have them."""
        known = self.task.source.labeled
        return known if count is None else (self.task.source.train if count > len(known) else known[:count])

    @cached_property
    def unlabeled_streams(self) -> dict[str, list[Any]]:
        """Source and target images in every style."""
        there, back = through(self.to_target), through(self.to_source)
        return {
            "source": items(self.task.source.train, labels=False, translated=there, cycled=lambda x: back(there(x))),
            "target": items(self.task.target.train, labels=False, translated=back, cycled=lambda x: there(back(x))),
        }

    def supervised(self, labeled: list[Any]) -> tuple[nn.Module, dict[str, Any]]:
        """The student trained on labeled items alone."""
        network = self.student()
        facts = fit(Supervised(network), {"labeled": labeled}, task=self.task, steps=self.steps, seed=self.seed,
                    batch_size=BATCH_SIZE, rates=STUDENT_RATE)  # fmt: skip
        return network, facts

    @cached_property
    def source_network(self) -> tuple[nn.Module, dict[str, Any]]:
        """The student trained on the labeled source images."""
        return self.supervised(items(self.labeled(), labels=True))

    @cache  # noqa: B019 - lives as long as the seed's process
    def labeled_stream(self, count: int | None) -> list[Any]:
        """Labeled source images and their cycles."""
        there, back = through(self.to_target), through(self.to_source)
        return items(self.labeled(count), labels=True, cycled=lambda x: back(there(x)))

    def adapted(self, make: Callable[[nn.Module, nn.Module], Method], count: int | None = None) -> Trained:
        """Train MT-UDA, LE-UDA or a part of them; tested in source style."""
        labeled = self.labeled_stream(count)
        method = make(self.student(), copy.deepcopy(self.to_source))
        rates = {role: STUDENT_RATE if role == "student" else CRITIC_RATE for role in method.roles}
        betas = {role: (0.5, 0.999) for role in method.roles if role != "student"}
        facts = fit(method, {"labeled": labeled, **self.unlabeled_streams}, task=self.task, steps=self.steps,
                    seed=self.seed, batch_size=BATCH_SIZE, rates=rates, betas=betas)  # fmt: skip
        return as_predictor(method.deployed), facts


def le_uda(student: nn.Module, generator: nn.Module, *, classes: int) -> LEUDA:
    """LE-UDA with critics at both decoder levels of the student."""

    def critics() -> nn.ModuleList:
        return nn.ModuleList([FeatureCritic(classes, 8), FeatureCritic(16, 8, layers=3)])

    return LEUDA(student, generator, critics(), critics(), layers=LAYERS)


def arms(task: Task, seed: int, steps: int) -> Iterator[tuple[str, Callable[[], Trained]]]:
    """All arms of a seed."""
    shared = Seed(task, seed, steps)

    def source_only() -> Trained:
        network, facts = shared.source_network
        return as_predictor(network), dict(facts)

    def translated_test() -> Trained:
        network, facts = shared.source_network
        return as_predictor(TranslateThenSegment(shared.to_source, network)), facts | shared.translations[1]

    def translated_training() -> Trained:
        labeled = [item | {"image": item["translated"]} for item in
                   items(shared.labeled(), labels=True, translated=through(shared.to_target))]  # fmt: skip
        network, facts = shared.supervised(labeled)
        return as_predictor(network), facts

    def target_bound() -> Trained:
        network, facts = shared.supervised(items(task.target.train, labels=True))
        return as_predictor(network), facts

    methods: dict[str, Callable[[nn.Module, nn.Module], Method]] = {
        CONTROL: partial(MTUDA, intra_weight=0.0, inter_weight=0.0),
        "mt_uda_without_inter": partial(MTUDA, inter_weight=0.0),
        "mt_uda_without_intra": partial(MTUDA, intra_weight=0.0),
        "mt_uda": MTUDA,
        "le_uda": partial(le_uda, classes=task.classes),
    }
    yield "source_only", source_only
    yield "translated_test", translated_test
    yield "translated_training", translated_training
    for name, make in methods.items():
        yield name, partial(shared.adapted, make)
    yield "target_bound", target_bound
    if task.name == "demo":
        for name, count in SWEEP:
            yield f"{name}_{count}_labeled", partial(shared.adapted, methods[name], count)


PAIRS = [
    ("le_uda", "source_only"),
    ("le_uda", "translated_test"),
    ("le_uda", CONTROL),
    ("le_uda", "mt_uda"),
    ("mt_uda", CONTROL),
    ("mt_uda", "mt_uda_without_inter"),
    ("mt_uda", "mt_uda_without_intra"),
    ("translated_test", "source_only"),
    ("target_bound", "le_uda"),
    *[(f"le_uda_{count}_labeled", f"{name}_{count}_labeled") for name, count in SWEEP if name != "le_uda"],
]
TITLES = {
    "source_only": "source only",
    "translated_test": "source only, tested on target → source",
    "translated_training": "trained on source → target",
    CONTROL: "zero-loss control (MT-UDA with both weights 0)",
    "mt_uda_without_inter": "MT-UDA, intra-domain term alone",
    "mt_uda_without_intra": "MT-UDA, inter-domain term alone",
    "mt_uda": "MT-UDA",
    "le_uda": "LE-UDA",
    "target_bound": "target labels (bound)",
}
SHORT = {CONTROL: "zero-loss control", "mt_uda": "MT-UDA", "le_uda": "LE-UDA"}
TITLES |= {
    f"{name}_{count}_labeled": f"{SHORT[name]}, {count} labeled volume{'s' if count > 1 else ''}"
    for name, count in SWEEP
}
FACTS = {
    "Student": "MONAI UNet, channels 16, 32, 64, BatchNorm",
    "Batch": f"{BATCH_SIZE} of every stream",
    "Optimizer": f"Adam {STUDENT_RATE} (critics {CRITIC_RATE}), poly decay",
    "Translation": f"one CycleGAN per seed, {GAN_BLOCKS} blocks of width {GAN_WIDTH}, {GAN_STEPS['demo']} steps of "
    f"{GAN_BATCH_SIZE} images, EMA generators",
    "Labeled source volumes where the arm does not say": "4 of 16 (demo), all 8 (ibsi_sts)",
}

if __name__ == "__main__":
    main(
        "le_uda",
        arms,
        heading="MT-UDA and LE-UDA",
        pairs=PAIRS,
        titles=TITLES,
        seeds={"demo": 5, "ibsi_sts": 3},
        steps={"demo": 225, "ibsi_sts": 250},
        facts=FACTS,
        notes="The CycleGAN's settings (BatchNorm, no identity term, steps) were chosen by the source model's Dice on "
        "translated test images of another virtual cohort; nothing was chosen on the held-out patients.",
        description=__doc__ or "",
    )
