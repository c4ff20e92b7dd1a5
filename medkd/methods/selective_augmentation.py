"""Selective synthetic augmentation: which generated images are worth adding to a small labeled set.

Paper: Xue et al. 2021, "Selective Synthetic Augmentation with HistoGAN for Improved Histopathology Image
Classification", Medical Image Analysis 67, arXiv:2111.06399; the distance over several layers is that of Xue et al.,
MICCAI 2019, "Synthetic Augmentation and Feature-based Filtering for Improved Cervical Histopathology Image
Classification", arXiv:1907.10655.
Roles: none, nothing is trained here: a classifier of the real images judges generated ones.

Differs: the entropy threshold is a share of the candidates of a class, since the paper's was not available.
Differs: one pass of Monte-Carlo dropout drops the same units for every image, so that an image's scores depend neither
on its neighbors in the batch nor on the order of the images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from medkd.errors import ConfigError, InputError
from medkd.nets.taps import Taps

RULES = ("confidence", "distance")
_EPSILON = 1e-10


@dataclass(frozen=True)
class Scores:
    """What the classifier thinks of N generated images; all tensors are (N,) on the CPU.

    Attributes:
        label: the class each was generated for.
        predicted: the class of the largest mean probability.
        confidence: mean probability of ``label`` over the passes, in [0, 1].
        entropy: of the mean probabilities, in nats.
        distance: from the centroid of the real training images of ``label``, >= 0; smaller is nearer.
    """

    label: torch.Tensor
    predicted: torch.Tensor
    confidence: torch.Tensor
    entropy: torch.Tensor
    distance: torch.Tensor

    def __len__(self) -> int:
        return len(self.label)


class SelectiveAugmentation:
    """Scores generated images with a classifier of the real training images.

    Confidence: the mean probabilities over ``passes`` passes with dropout. Distance: Σ_l 1/(H_l W_l) Σ_hw |φ_l - c_l|²
    between the features φ_l of layer l, normalized over channels at every position, and their mean c_l over the *real
    training* images of the class. Give :meth:`fit` nothing else: neither generated nor test images.

    Args:
        classifier: (B, C, H, W) → logits (B, K), trained on real images; it is left as it is.
        layers: names of the modules whose outputs (B, C, H, W) or (B, C) are compared.
        prepare: turns images as they are stored into what the classifier takes.
        passes: of Monte-Carlo dropout.
        batch_size: images at once; the scores do not depend on it.
        seed: of the dropped units.

    Raises:
        ConfigError: If the classifier has no dropout, or no layer is named.
        ValueError: If the classifier has no module of a name.
    """

    def __init__(
        self,
        classifier: nn.Module,
        layers: Sequence[str],
        *,
        prepare: Callable[[torch.Tensor], torch.Tensor] | None = None,
        passes: int = 20,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        if not layers:
            raise ConfigError("layers", "none is named", "name modules of the classifier whose features are compared")
        if not _dropouts(classifier):
            raise ConfigError(
                "classifier", "it has no dropout, so its doubt cannot be measured", "build it with dropout above 0"
            )
        Taps(classifier, layers)  # refuses unknown names now
        self.classifier = classifier
        self.layers = tuple(layers)
        self.prepare = prepare
        self.passes = passes
        self.batch_size = batch_size
        self.seed = seed
        self.centroids: dict[int, dict[str, torch.Tensor]] = {}

    @torch.no_grad()
    def fit(self, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Compute the centroid of every class.

        Args:
            batches: real training images (B, C, H, W) and their classes (B,), without augmentation.

        Raises:
            InputError: If there is no image.
        """
        sums: dict[int, dict[str, torch.Tensor]] = {}
        counts: dict[int, int] = {}
        for image, label in batches:
            features = self._features(image)
            for value in sorted(set(label.tolist())):
                chosen = (label == value).nonzero().squeeze(1).to(image.device)
                counts[value] = counts.get(value, 0) + len(chosen)
                own = sums.setdefault(value, {})
                for name, feature in features.items():
                    total = feature[chosen].double().sum(dim=0)
                    own[name] = own[name] + total if name in own else total
        if not counts:
            raise InputError("centroids", "there is no real training image", "give labeled images of every class")
        self.centroids = {
            value: {name: (total / counts[value]).float() for name, total in own.items()} for value, own in sums.items()
        }

    @torch.no_grad()
    def score(self, image: torch.Tensor, label: torch.Tensor) -> Scores:
        """Judge generated images.

        Args:
            image: (N, C, H, W).
            label: (N,) the classes they were generated for.

        Raises:
            InputError: If a class has no centroid.
        """
        missing = sorted(set(label.tolist()) - set(self.centroids))
        if missing:
            raise InputError(
                "centroids", f"there is none of the classes {missing}", "fit on real images of every class"
            )
        parts = [
            self._score(image[start : start + self.batch_size], label[start : start + self.batch_size])
            for start in range(0, len(image), self.batch_size)
        ]
        columns = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
        return Scores(label.long().cpu(), *columns)

    def _score(self, image: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, ...]:
        probability = self._mean_probability(image)
        own = probability.gather(1, label.long().to(probability.device)[:, None]).squeeze(1)
        entropy = -(probability * probability.clamp_min(1e-12).log()).sum(dim=1)
        return probability.argmax(dim=1), own, entropy, self._distance(image, label)

    def _mean_probability(self, image: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(())
        with _evaluating(self.classifier):
            for number in range(self.passes):
                with _thinned(self.classifier, self.seed + number):
                    logits = self.classifier(self._prepared(image))
                total = total.to(logits.device) + torch.softmax(logits.float(), dim=1)
        return total / self.passes

    def _distance(self, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        distances = torch.zeros(len(image), device=image.device)
        for name, feature in self._features(image).items():
            centroid = torch.stack([self.centroids[value][name] for value in label.tolist()])
            squared = (feature - centroid).square().sum(dim=1)  # (B, H, W), or (B,) of a vector
            distances += squared.flatten(1).mean(dim=1) if squared.ndim > 1 else squared
        return distances

    def _features(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features of every layer, of length 1 over the channels."""
        with _evaluating(self.classifier), torch.no_grad(), Taps(self.classifier, self.layers) as features:
            self.classifier(self._prepared(image))
        return {
            name: value.float() / (value.float().norm(dim=1, keepdim=True) + _EPSILON)
            for name, value in features.items()
        }

    def _prepared(self, image: torch.Tensor) -> torch.Tensor:
        return image if self.prepare is None else self.prepare(image)


def select(
    scores: Scores, *, keep: float = 0.25, confident: float = 0.5, rules: Sequence[str] = RULES
) -> dict[int, torch.Tensor]:
    """Choose images: of every class with n candidates at most ceil(keep · n), the best first.

    ``confidence``: the classifier must name the class the image was generated for; of those, the ceil(confident · n) of
    the lowest entropy go on. ``distance``: those nearest to their class's centroid are kept. With ``confidence`` alone
    those of the lowest entropy are kept; with ``distance`` alone all candidates take part. Fewer are kept only where
    fewer pass ``confidence``. The choice does not depend on the order of the candidates.

    Args:
        scores: of the candidates.
        keep: share of a class's candidates that is kept, in (0, 1].
        confident: share that passes ``confidence`` at most, in [keep, 1].
        rules: ``"confidence"``, ``"distance"`` or both.

    Returns:
        Class → positions of the chosen images in ``scores``.

    Raises:
        ConfigError: If a share or a rule is out of range.
        InputError: If no image of a class passes; the message gives the distribution of its scores.
    """
    if not rules or set(rules) - set(RULES):
        raise ConfigError("rules", f"{list(rules)} are not among {list(RULES)}", "use one of them, or both")
    if not 0 < keep <= confident <= 1:
        raise ConfigError(
            "keep", f"0 < {keep} <= {confident} <= 1 does not hold", "keep no more than pass as confident"
        )
    chosen: dict[int, torch.Tensor] = {}
    for value in sorted(set(scores.label.tolist())):
        place = (scores.label == value).nonzero().squeeze(1)
        total = len(place)
        if "confidence" in rules:
            agreed = place[scores.predicted[place] == value]
            if not len(agreed):
                raise InputError(f"class {value}", _refusal(scores, place), "train classifier and generator longer")
            by_entropy = _ranked(agreed, scores.entropy, scores.distance)
            place = by_entropy[: math.ceil(confident * total)]
        if "distance" in rules:
            place = _ranked(place, scores.distance, scores.entropy)
        chosen[value] = place[: math.ceil(keep * total)]
    return chosen


def _ranked(place: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Positions by ascending ``first``, ties by ``second``; images equal in both cannot be told apart."""
    order = sorted(place.tolist(), key=lambda index: (float(first[index]), float(second[index])))
    return torch.tensor(order, dtype=torch.int64)


def _refusal(scores: Scores, place: torch.Tensor) -> str:
    quantiles = torch.tensor([0.0, 0.5, 1.0])
    described = ", ".join(
        f"{name} {' / '.join(f'{value:.3g}' for value in torch.quantile(column[place].float(), quantiles).tolist())}"
        for name, column in (
            ("confidence", scores.confidence), ("entropy", scores.entropy), ("distance", scores.distance)
        )
    )  # fmt: skip
    return (
        f"the classifier takes none of the {len(place)} generated images for what they should be "
        f"(lowest / median / highest: {described})"
    )


def _dropouts(network: nn.Module) -> list[_DropoutNd]:
    return [module for module in network.modules() if isinstance(module, _DropoutNd) and module.p > 0]


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Eval mode, with the modes of all modules as they were afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _thinned(network: nn.Module, seed: int) -> Iterator[None]:
    """A network in eval mode that lacks the same random units for every image, as ``seed`` says."""
    generator = torch.Generator().manual_seed(seed)
    handles = [module.register_forward_hook(partial(_drop, generator)) for module in _dropouts(network)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _drop(generator: torch.Generator, module: _DropoutNd, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    whole_channels = not isinstance(module, nn.Dropout)
    shape = (1, output.shape[1], *(1 for _ in output.shape[2:])) if whole_channels else (1, *output.shape[1:])
    kept = torch.rand(shape, generator=generator) >= module.p
    return output * kept.to(output) / max(1.0 - module.p, _EPSILON)
