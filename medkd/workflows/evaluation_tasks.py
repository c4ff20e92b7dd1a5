"""Which model of an evaluation scores which case."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from medkd.data.datalists import Datalist
from medkd.deploy.bundle import LoadedBundle
from medkd.errors import ConfigError, InputError

Split = Literal["training", "validation", "test"]


@dataclass(frozen=True)
class Task:
    """One case and the models whose mean prediction is scored on it."""

    item: Mapping[str, Any]
    bundles: list[LoadedBundle]


def evaluation_tasks(bundles: list[LoadedBundle], listed: Datalist, split: Split) -> tuple[list[Task], str]:
    """Which bundles score which case, and how that is called in the summary.

    Raises:
        ConfigError: bundles that cannot be pooled on folds.
        InputError: no case in that split.
    """
    if split == "validation" and listed.folds:
        folds = [bundle.fold for bundle in bundles]
        if None in folds and len(bundles) > 1:
            place = bundles[folds.index(None)].path / "configs" / "metadata.json"
            raise ConfigError(place, 'has no "fold"', "pool models trained with --fold, or use --split test")
        if len(set(folds)) < len(folds):
            raise ConfigError("MODEL", f"two models held out the same fold ({folds})", "name each fold's model once")
        if folds[0] is not None:
            tasks = [
                Task(item, [bundle])
                for bundle in bundles
                for item in listed.section("validation", fold=bundle.fold, for_training=False)
            ]
            return _not_empty(tasks, listed, split), "each model on the fold it held out"
    items = listed.section(split, for_training=False)
    how = "one model" if len(bundles) == 1 else f"mean probabilities of {len(bundles)} models"
    return _not_empty([Task(item, bundles) for item in items], listed, split), how


def _not_empty(tasks: list[Task], listed: Datalist, split: str) -> list[Task]:
    if not tasks:
        raise InputError(listed.where, f"has no case in {split}", "choose another --split")
    return tasks
