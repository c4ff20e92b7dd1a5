from __future__ import annotations

from pathlib import Path

import pytest
from bundle_factory import make_bundle


@pytest.fixture(scope="session")
def shared_bundle(tmp_path_factory) -> Path:
    """A bundle that no test may change."""
    return make_bundle(tmp_path_factory.mktemp("bundles") / "small_segmentation")
