"""``medkd data``: what its commands do beyond one call of :mod:`medkd.data`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medkd.data.datalist_rules import SECTIONS
from medkd.data.datalists import Case, Datalist
from medkd.data.findings import Finding
from medkd.errors import ConfigError, InputError


def without_errors(datalist: Datalist, findings: Sequence[Finding]) -> tuple[Datalist, list[str]]:
    """A datalist without the cases that have errors.

    Returns:
        The datalist and the names of the cases left out.

    Raises:
        InputError: no case would be left.
    """
    removed = {finding.case for finding in findings if finding.severity == "error" and finding.case}
    kept: dict[str, list[Case]] = {
        section: [case for case in datalist.cases(section) if datalist.case_id(case) not in removed]
        for section in SECTIONS
    }
    if not any(kept.values()):
        raise InputError(datalist.where, "has errors in every case", "correct the files")
    return datalist.model_copy(update={**kept, "path": None}), sorted(removed)


def case_counts(datalist: Datalist) -> dict[str, tuple[int, int]]:
    """Section → (cases, patients), for the sections that have cases."""
    return {
        str(section): (len(cases), len({case.patient for case in cases}))
        for section in SECTIONS
        if (cases := datalist.cases(section))
    }


def require_free_file(path: Path, *, overwrite: bool = False) -> None:
    """Refuse to replace a file unasked.

    Raises:
        ConfigError: it exists and ``overwrite`` is False, or it is a folder.
    """
    if path.is_dir():
        raise ConfigError(path, "is a folder", "name a file")
    if path.exists() and not overwrite:
        raise ConfigError(path, "exists", "choose another name, or pass --overwrite")
