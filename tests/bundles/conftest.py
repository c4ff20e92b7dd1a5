"""Cohorts of tiny volumes and tiles, copies of the shipped bundles, and one short training of each."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from bundle_copies import HEART, NAMES, Copy, copy_of, write_cohort, write_domains, write_tiles


@pytest.fixture(scope="session")
def cohort(tmp_path_factory) -> Path:
    """A folder with `volumes` (two labeled, two unlabeled, one validation and one test patient) and other cohorts."""
    root = tmp_path_factory.mktemp("cohort")
    writers = {
        "volumes": write_cohort,
        "tiles": write_tiles,
        "domains": write_domains,
        "hearts": partial(write_domains, labels=HEART),
    }
    for name, write in writers.items():
        (root / name).mkdir()
        write(root / name)
    return root


@pytest.fixture(params=NAMES)
def copy(request, tmp_path, cohort) -> Copy:
    """A fresh copy of each shipped bundle in turn."""
    return copy_of(request.param, tmp_path, cohort)


@pytest.fixture(scope="session", params=NAMES)
def trained(request, tmp_path_factory, cohort) -> Copy:
    """A copy of each shipped bundle in turn, trained for two iterations by MONAI's `run`; no test may change it."""
    made = copy_of(request.param, tmp_path_factory.mktemp("trained"), cohort)
    made.run("train")
    return made
