"""What a check of a datalist has found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One thing to look at.

    Attributes:
        severity: ``error`` stops a training, ``warning`` does not.
        case: the case, empty for what concerns the whole datalist.
        file: the file at fault.
        problem: what is wrong with it.
        remedy: what to do about it.
    """

    severity: Literal["error", "warning"]
    case: str
    file: str
    problem: str
    remedy: str
