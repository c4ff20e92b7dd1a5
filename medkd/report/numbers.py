"""How numbers are written for people: units, intervals, and never more digits than the measurement carries."""

from __future__ import annotations

import math
from collections.abc import Sequence

MINUS = "−"
INFINITY = "∞"
ABSENT = "–"
GAP = "\u202f"  # narrow, and lines do not break at it
NOT_APPLICABLE = "n/a"
SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def fixed(value: float | None, decimals: int) -> str:
    """``0.812``; ``∞`` and ``n/a`` for infinite and undefined values, ``–`` for a missing one."""
    if value is None:
        return ABSENT
    if math.isnan(value):
        return NOT_APPLICABLE
    if math.isinf(value):
        return INFINITY if value > 0 else MINUS + INFINITY
    text = f"{value:,.{decimals}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("-")  # a rounded −0.0002 is written 0.000
    return text.replace(",", GAP).replace("-", MINUS)


def signed(value: float | None, decimals: int) -> str:
    """A difference: ``+0.034`` or ``−0.012``."""
    text = fixed(value, decimals)
    return f"+{text}" if value is not None and math.isfinite(value) and value > 0 and text.strip("0.") else text


def interval(estimate: float | None, low: float | None, high: float | None, decimals: int) -> str:
    """``0.812 [0.790, 0.831]``; the estimate alone where there is no finite interval."""
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return fixed(estimate, decimals)
    return f"{fixed(estimate, decimals)} [{fixed(low, decimals)}, {fixed(high, decimals)}]"


def p_value(value: float | None) -> str:
    """``0.23``, ``0.012``, ``< 0.001``."""
    if value is None or not math.isfinite(value):
        return NOT_APPLICABLE
    if value < 0.001:
        return "< 0.001"
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def count(number: int, noun: str, plural: str | None = None) -> str:
    """``1 patient``, ``12 patients``."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}".replace(",", GAP)


def scaled_column(values: Sequence[float | None]) -> tuple[list[str], str]:
    """Write a column of positive quantities in one common SI prefix, so that their decimals align.

    Args:
        values: the quantities; None where unknown.

    Returns:
        The texts and the prefix (``"M"`` for mega; empty for none). The smallest value keeps three significant
        digits, down to three decimals at most.
    """
    known = [value for value in values if value is not None and math.isfinite(value) and value > 0]
    if not known:
        return [fixed(value, 0) for value in values], ""
    factor, prefix = next(((f, p) for f, p in SCALES if max(known) >= f), (1.0, ""))
    smallest = min(known) / factor
    decimals = min(3, max(0, 2 - math.floor(math.log10(smallest))))
    if factor == 1.0 and all(float(value).is_integer() for value in known):
        decimals = 0
    return [fixed(None if value is None else value / factor, decimals) for value in values], prefix


def ratio(larger: float, smaller: float) -> str:
    """How many times smaller: ``257×``, ``3.4×``."""
    times = larger / smaller
    return f"{times:,.0f}×".replace(",", GAP) if times >= 10 else f"{times:.1f}×"


def si(value: float) -> str:
    """Three significant digits with an SI prefix: ``124 M``, ``484 k``."""
    factor, prefix = next(((f, f" {p}") for f, p in SCALES if value >= f), (1.0, ""))
    return f"{value / factor:.3g}{prefix}"
