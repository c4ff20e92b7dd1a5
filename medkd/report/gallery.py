"""Pictures of cases: which cases stand for a cohort, how their files are called, and how a page holds them."""

from __future__ import annotations

import math
import re
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medkd.metrics.cases import CaseScore
from medkd.report import cohort, numbers
from medkd.report.run_folder import Arm, Evaluation

RANKS = ("best", "median", "worst")
MAX_PICTURE_BYTES = 1_500_000
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def representative_cases(scores: Sequence[CaseScore]) -> dict[str, str]:
    """Pick the cases to show, by their mean Dice over classes.

    Args:
        scores: of all cases of one evaluation.

    Returns:
        rank → case id for worst, best and median; fewer where there are fewer cases with a score.
    """
    values = cohort.case_values([Evaluation(Path(), list(scores), [], [])], cohort.DICE)
    ordered = [v.case for v in sorted(values, key=lambda v: (v.value, v.case)) if not math.isnan(v.value)]
    picked: dict[str, str] = {}
    for rank, place in (("worst", 0), ("best", len(ordered) - 1), ("median", len(ordered) // 2)):
        if ordered and ordered[place] not in picked.values():
            picked[rank] = ordered[place]
    return picked


def picture_name(rank: str, case: str) -> str:
    """The file name of a case's picture in worst_cases/: ``worst_<case>.png``."""
    return f"{rank}_{_safe(case)}.png"


def galleries(arms: Sequence[Arm]) -> tuple[list[dict[str, Any]], str]:
    """The pictures of every arm (of its first seed that has some), as data URIs within a budget.

    Returns:
        A gallery per arm with pictures, and the names of the pictures that were left out.
    """
    chosen = [
        (arm, evaluation, path)
        for arm in arms
        for evaluation in [e for e in arm.evaluations if e.pictures][:1]
        for path in evaluation.pictures
    ]
    places = {arm.name: place for place, arm in enumerate(arms)}
    # The first pictures of every arm matter more than all pictures of one.
    chosen.sort(key=lambda found: (_rank_order(found[2]), places[found[0].name], found[2].name))
    shown: dict[str, list[dict[str, Any]]] = {}
    left_out, spent = [], 0
    for arm, evaluation, path in chosen:
        size = path.stat().st_size
        content = path.read_bytes() if spent + size <= MAX_PICTURE_BYTES else b""
        if not content.startswith(PNG_SIGNATURE):
            left_out.append(f"{arm.title}: {path.name}")
            continue
        spent += size
        shown.setdefault(arm.name, []).append(_picture(evaluation, path, content))
    found = [{"title": arm.title, "pictures": shown[arm.name]} for arm in arms if arm.name in shown]
    return found, ", ".join(left_out)


def _picture(evaluation: Evaluation, path: Path, content: bytes) -> dict[str, Any]:
    rank, _, safe = path.stem.partition("_")
    is_ranked = rank in RANKS
    scores = [score for score in evaluation.scores if _safe(score.case) == (safe if is_ranked else path.stem)]
    one_case = [Evaluation(path, scores, [], [])]
    parts = [scores[0].case if scores else (safe if is_ranked else path.stem)]
    for measure in (cohort.DICE, cohort.HD95):
        for value in cohort.case_values(one_case, measure):
            unit = f" {cohort.unit(one_case)}" if measure.is_distance and math.isfinite(value.value) else ""
            parts.append(f"{measure.title} {numbers.fixed(value.value, measure.decimals)}{unit}")
    if any(score.missed for score in scores):
        parts.append("missed: " + ", ".join(score.class_name for score in scores if score.missed))
    return {
        "rank": rank.capitalize() if is_ranked else "",
        "caption": " · ".join(parts),
        "alt": f"{rank if is_ranked else 'a'} case: image, reference and prediction",
        "data": "data:image/png;base64," + b64encode(content).decode("ascii"),
    }


def _rank_order(path: Path) -> int:
    rank = path.stem.partition("_")[0]
    return RANKS.index(rank) if rank in RANKS else len(RANKS)


def _safe(case: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", case)
