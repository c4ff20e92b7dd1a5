"""What every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real scans and slides; tests that need it skip where it is absent."""
    root = Path(os.environ.get("MEDKD_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not root.is_dir():
        pytest.skip("real data not present (set MEDKD_DATA to its folder)")
    return root
