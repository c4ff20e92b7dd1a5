"""Which domain of a datalist is labeled, and which one is adapted to."""

from __future__ import annotations

from typing import Any

from medkd.data.datalists import Datalist
from medkd.errors import InputError


def source_domain(cases: Datalist) -> str:
    """The domain whose cases are labeled for training.

    Raises:
        InputError: If the training cases name none, or several.
    """
    domains = sorted({case.domain for case in cases.training if case.domain is not None})
    if len(domains) != 1:
        has = f"are of {' and '.join(domains)}" if domains else 'name no "domain"'
        raise InputError(cases.where, f"its training cases {has}", "choose one with source_domain=NAME")
    return domains[0]


def target_domain(cases: Datalist, source: str) -> str:
    """The domain without labels: the one besides ``source`` among the unlabeled cases.

    Args:
        cases: the datalist.
        source: the labeled domain.

    Raises:
        InputError: If there is none, or several.
    """
    domains = sorted({case.domain for case in cases.unlabeled if case.domain not in (None, source)} - {None})
    if len(domains) != 1:
        has = f"are of {' and '.join(map(str, domains))}" if domains else f"are of no domain but {source!r}"
        raise InputError(
            cases.where,
            f"its unlabeled cases {has}",
            "choose one with target_domain=NAME" if domains else "list unlabeled cases of the target domain",
        )
    return str(domains[0])


def labeled_items(cases: Datalist, domain: str, *, fold: int | None = None) -> list[dict[str, Any]]:
    """The training items of a domain that a method needs labels of.

    Args:
        cases: the datalist.
        domain: the domain.
        fold: the fold held out; None for the section as it stands.

    Raises:
        InputError: If no case of the domain has a label, or there is no such domain or fold.
    """
    items = [item for item in cases.section("training", fold=fold, domain=domain) if "label" in item]
    if not items:
        raise InputError(
            cases.where, f"no training case of {domain!r} has a label", "list labeled cases of both domains"
        )
    return items
