"""What a student of two image domains and its two teachers have to agree on (MT-UDA, LE-UDA)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from medkd.errors import ConfigError
from medkd.losses.consistency import probability_mse, self_information_consistency

_RENDERINGS = {
    "labeled": ("image", "label", "cycled"),
    "source": ("image", "translated", "cycled"),
    "target": ("image", "translated", "cycled"),
}


class Renderings(NamedTuple):
    """One batch of the three streams: every image in both domains' styles; each a (B, C, *S) tensor in [-1, 1].

    B is one number for the labeled stream, one for the source stream and one for the target stream. "Cycled" is an
    image translated there and back, in its own domain's style again.
    """

    labeled: torch.Tensor
    labeled_cycled: torch.Tensor
    label: torch.Tensor
    source: torch.Tensor
    source_as_target: torch.Tensor
    source_cycled: torch.Tensor
    target: torch.Tensor
    target_as_source: torch.Tensor
    target_cycled: torch.Tensor

    @classmethod
    def of(cls, batch: Mapping[str, Mapping[str, Any]]) -> Renderings:
        """Take the tensors out of a batch of the streams labeled, source and target.

        Raises:
            ConfigError: If a label or a rendering is missing, or the images differ in their number of channels.
        """
        for stream, keys in _RENDERINGS.items():
            missing = [key for key in keys if key not in batch[stream]]
            if "label" in missing:
                raise ConfigError(
                    "stream 'labeled'", "has images without labels", "list source cases with labels under training"
                )
            if missing:
                raise ConfigError(
                    f"stream {stream!r}", f"its items lack {missing}", "translate the images first (TranslateSlicesd)"
                )
        labeled, source, target = (batch[name] for name in _RENDERINGS)
        made = cls(
            labeled["image"], labeled["cycled"], labeled["label"],
            source["image"], source["translated"], source["cycled"],
            target["image"], target["translated"], target["cycled"],
        )  # fmt: skip
        channels = {name: tensor.shape[1] for name, tensor in made._asdict().items() if name != "label"}
        if len(set(channels.values())) > 1:
            counts = ", ".join(f"{name} {count}" for name, count in channels.items())
            raise ConfigError("streams", f"their images differ in channels: {counts}", "give all one channel count")
        return made

    @property
    def of_student(self) -> tuple[torch.Tensor, ...]:
        """What the student sees, all in source style: labeled, its cycle, source, its cycle, target as source."""
        return (self.labeled, self.labeled_cycled, self.source, self.source_cycled, self.target_as_source)

    @property
    def of_intra_teacher(self) -> tuple[torch.Tensor, ...]:
        """What the intra-domain teacher sees, in source style: source, target as source."""
        return (self.source, self.target_as_source)

    @property
    def of_inter_teacher(self) -> tuple[torch.Tensor, ...]:
        """What the inter-domain teacher sees, in target style: source as target, target, its cycle."""
        return (self.source_as_target, self.target, self.target_cycled)


class StudentLogits(NamedTuple):
    """The student's answers, (B, K, *S) each, in the order of :attr:`Renderings.of_student`."""

    labeled: torch.Tensor
    labeled_cycled: torch.Tensor
    source: torch.Tensor
    source_cycled: torch.Tensor
    target_as_source: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, renderings: Renderings) -> StudentLogits:
        """Split the logits of the joined images."""
        return cls(*logits.split([len(part) for part in renderings.of_student]))


def intra_domain_consistency(
    student: StudentLogits, teacher_logits: torch.Tensor, renderings: Renderings
) -> torch.Tensor:
    """Agreement on the same image in source style: MSE of probabilities, on source plus on translated target images.

    Args:
        student: the student's logits.
        teacher_logits: (B, K, *S) of the joined :attr:`Renderings.of_intra_teacher`; receives no gradient.
        renderings: tells how they are joined.

    Returns:
        Scalar.

    Source: MT-UDA, arXiv:2203.12454, the semantic consistency; pairs as in the released code.
    """
    source, target_as_source = teacher_logits.split([len(part) for part in renderings.of_intra_teacher])
    return probability_mse(student.source, source) + probability_mse(student.target_as_source, target_as_source)


def inter_domain_consistency(
    student: StudentLogits, teacher_logits: torch.Tensor, renderings: Renderings
) -> torch.Tensor:
    """Agreement across styles of the same anatomy: weighted self-information, summed over four pairs.

    The pairs (student | teacher): (s | s→t), (s→t→s | s→t), (t→s | t), (t→s | t→s→t).

    Args:
        student: the student's logits.
        teacher_logits: (B, K, *S) of the joined :attr:`Renderings.of_inter_teacher`; receives no gradient.
        renderings: tells how they are joined.

    Returns:
        Scalar.

    Source: MT-UDA, arXiv:2203.12454, the structural consistency; pairs as in the released code.
    """
    source_as_target, target, cycled = teacher_logits.split([len(part) for part in renderings.of_inter_teacher])
    pairs = (
        (student.source, source_as_target),
        (student.source_cycled, source_as_target),
        (student.target_as_source, target),
        (student.target_as_source, cycled),
    )
    return torch.stack([self_information_consistency(*pair) for pair in pairs]).sum()
