"""CMEDL against what it could be mistaken for, at equal steps and equal data.

    python benchmarks/cmedl.py --task demo                  the embedded patients: the student T2, the teacher T1
    python benchmarks/cmedl.py --task ibsi_sts --data DIR   real sarcomas: the student CT, the teacher MR
    python benchmarks/cmedl.py --task demo --report         only summarize the seeds already computed

Both modalities have labels, no patient is in both. The student's modality is scored on patients that nothing was chosen
on, with the final iterate; learning rates were chosen on training patients, with the supervised arm. The arms have the
same segmentation network, initial weights, batch size and number of steps:

- supervised: the student's modality alone ("CT only").
- cmedl: the student of a CMEDL run, as it ships.
- teacher_on_pseudo: the teacher of that same run, at test time behind its generator ("pseudo-MR as input").
- two_channels: supervised on the image and its pseudo-image by the generator of that run ("CT + pMR").
- random_teacher: CMEDL, but the hint comes from a network that never learns (its own translation and teacher train
  along as always): what remains of the hint if the teacher knows nothing.
- no_contextual: CMEDL without the contextual loss.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from two_domains import Predictor, Task, as_predictor, fit, items, main

from medkd.methods.cmedl import CMEDL
from medkd.methods.cyclegan import CycleGAN
from medkd.methods.supervised import Supervised
from medkd.nets.bilinear_unets import BilinearUNet
from medkd.nets.taps import Taps
from medkd.nets.translate_then_segment import TranslateThenSegment
from medkd.nets.translators import ResNetGenerator, patch_critic

Trained = tuple[Predictor, dict[str, Any]]

WIDTHS = (8, 16, 32, 32)
RATES = {"student": 2e-3, "teacher": 2e-3, "generators": 5e-4, "critics": 2e-4}
BETAS = {"generators": (0.5, 0.999), "critics": (0.5, 0.999)}
BATCH_SIZE = 4


class FewFeatures(nn.Module):
    """A small VGG with fixed random weights, for the contextual loss: features at a half and a quarter."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        generator = torch.Generator().manual_seed(seed)
        for layer in (self.fine, self.coarse):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """(B, 1, H, W) → maps at a quarter of the resolution, of 16 and of 32 channels."""
        half = functional.max_pool2d(functional.relu(self.fine(image)), 2)
        quarter = functional.max_pool2d(functional.relu(self.coarse(half)), 2)
        return [functional.avg_pool2d(half, 2), quarter]


class RandomTeacherCMEDL(CMEDL):
    """CMEDL whose hint comes from a network of the teacher's kind that is in no role, hence never changes."""

    def __init__(self, *networks: Any, random_teacher: nn.Module, **options: Any) -> None:
        super().__init__(*networks, **options)
        self.random_teacher = random_teacher

    def hint_targets(self, pseudo: torch.Tensor, teacher_features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Its features of the pseudo-images, normalized by their batch like the teacher's."""
        with torch.no_grad(), Taps(self.random_teacher, self.teacher_layers) as features:
            self.random_teacher(pseudo)
        return [features[name] for name in self.teacher_layers]


class WithPseudoImage(nn.Module):
    """Segments an image together with its translation by a frozen generator."""

    def __init__(self, generator: nn.Module, segmenter: nn.Module) -> None:
        super().__init__()
        self.translate, self.segmenter = TranslateThenSegment(generator, nn.Identity()), segmenter

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 1, H, W) → logits (B, K, H, W)."""
        with torch.no_grad():
            pseudo = self.translate(image)
        logits: torch.Tensor = self.segmenter(torch.cat([image, pseudo], dim=1))
        return logits


def segmenter(task: Task, seed: int, *, in_channels: int = 1) -> BilinearUNet:
    """CMEDL's U-Net, much narrower."""
    torch.manual_seed(seed)
    return BilinearUNet(2, in_channels, task.classes, WIDTHS)


def cycle_gan(seed: int) -> CycleGAN:
    """A small CycleGAN."""
    torch.manual_seed(seed + 100)
    return CycleGAN(
        nn.ModuleDict({name: ResNetGenerator(width=8, blocks=3) for name in ("to_target", "to_source")}),
        nn.ModuleDict({name: patch_critic(width=8, layers=2) for name in ("source", "target")}),
        identity_weight=0.0,
    )


def streams(task: Task) -> dict[str, list[Any]]:
    """The student learns the task's target modality; the teacher has the source's."""
    return {"student": items(task.target.train, labels=True), "teacher": items(task.source.train, labels=True)}


def supervised(task: Task, seed: int, steps: int, network: nn.Module) -> Trained:
    """A network trained on the student's modality."""
    method = Supervised(network)
    facts = fit(
        method, {"labeled": streams(task)["student"]}, task=task, steps=steps, seed=seed, batch_size=BATCH_SIZE,
        rates=RATES["student"],
    )  # fmt: skip
    return as_predictor(method.student), facts | {"parameters": count(network)}


def distilled(
    task: Task, seed: int, steps: int, method_class: Callable[..., CMEDL] = CMEDL, **options: Any
) -> tuple[CMEDL, dict[str, Any]]:
    """One CMEDL run, and its facts."""
    method = method_class(segmenter(task, seed), segmenter(task, seed + 1), cycle_gan(seed), FewFeatures(), **options)
    facts = fit(
        method, streams(task), task=task, steps=steps, seed=seed, batch_size=BATCH_SIZE, rates=RATES, betas=BETAS
    )
    return method, facts | {"parameters": count(method.deployed)}


def student_of(run: Callable[[], tuple[CMEDL, dict[str, Any]]]) -> Trained:
    """What ships."""
    method, facts = run()
    return as_predictor(method.deployed), facts


def teacher_of(run: Callable[[], tuple[CMEDL, dict[str, Any]]]) -> Trained:
    """The teacher behind the generator that it was trained with, the raw one."""
    method, facts = run()
    both = TranslateThenSegment(generator_of(method), method.teacher)
    return as_predictor(both), facts | {"parameters": count(both)}


def two_channels(task: Task, seed: int, steps: int, run: Callable[[], tuple[CMEDL, dict[str, Any]]]) -> Trained:
    """Supervised on image and pseudo-image; the generator is the finished one of the CMEDL run."""
    return supervised(task, seed, steps, WithPseudoImage(generator_of(run()[0]), segmenter(task, seed, in_channels=2)))


def generator_of(method: CMEDL) -> nn.Module:
    """A copy of the generator that makes pseudo-images."""
    return copy.deepcopy(method.generators["to_target"])


def count(network: nn.Module) -> int:
    """Parameters, frozen ones included."""
    return sum(parameter.numel() for parameter in network.parameters())


def arms(task: Task, seed: int, steps: int) -> Iterator[tuple[str, Callable[[], Trained]]]:
    """The arms of one seed; three of them share one CMEDL run."""
    run = cache(partial(distilled, task, seed, steps))
    yield "supervised", lambda: supervised(task, seed, steps, segmenter(task, seed))
    yield "cmedl", lambda: student_of(run)
    yield "teacher_on_pseudo", lambda: teacher_of(run)
    yield "two_channels", lambda: two_channels(task, seed, steps, run)
    knows_nothing = partial(
        distilled, task, seed, steps, RandomTeacherCMEDL, random_teacher=segmenter(task, seed + 2000)
    )
    yield "random_teacher", lambda: student_of(knows_nothing)
    yield "no_contextual", lambda: student_of(partial(distilled, task, seed, steps, contextual_weight=0.0))


TITLES = {
    "supervised": "student's modality only",
    "cmedl": "CMEDL (student)",
    "teacher_on_pseudo": "pseudo-image as input (teacher behind the generator)",
    "two_channels": "image + pseudo-image as two channels",
    "random_teacher": "CMEDL, hint from a random network",
    "no_contextual": "CMEDL without the contextual loss",
}
PAIRS = [
    ("cmedl", "supervised"),
    ("cmedl", "random_teacher"),
    ("cmedl", "teacher_on_pseudo"),
    ("cmedl", "two_channels"),
    ("cmedl", "no_contextual"),
    ("random_teacher", "supervised"),
]
NOTES = """\
The claim under test is *CMEDL − student's modality only*; *CMEDL − random network* says how much of it is what the
teacher knows rather than regularization by any second signal. Pseudo-image arms need the generator at test time, CMEDL
does not. Not tested: the paper's data (lung tumors, 377 CT and 82 MR), network sizes, several raters, the weak teacher
and the equal teacher (MR and MR, several organs)."""

if __name__ == "__main__":
    main(
        "cmedl",
        arms,
        heading="CMEDL",
        pairs=PAIRS,
        titles=TITLES,
        seeds={"demo": 5, "ibsi_sts": 3},
        steps={"demo": 300, "ibsi_sts": 500},
        facts={
            "segmenters": f"U-Net, widths {WIDTHS}",
            "translation": "CycleGAN without identity term, generators of width 8 with 3 blocks, critics of width 8",
            "contextual loss": "on features of a small convolutional network with fixed random weights",
            "training": f"batches of {BATCH_SIZE} + {BATCH_SIZE}, Adam, learning rates {RATES}, poly decay",
        },
        notes=NOTES,
        description=__doc__,
    )
