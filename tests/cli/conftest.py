from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "deploy"))

from bundle_factory import make_bundle


@pytest.fixture(scope="session")
def shared_bundle(tmp_path_factory) -> Path:
    """A bundle that no test may change."""
    return make_bundle(tmp_path_factory.mktemp("bundles") / "small_segmentation")
