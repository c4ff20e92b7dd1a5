"""What the workers of the fleet's tests do; kept apart from the tests, so that a worker imports nothing else."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def work(unit, report):
    """Does what the unit's name says."""
    name, *rest = unit.split(":")
    if name == "raises":
        raise ValueError(f"bad data in {rest[0]}")
    if name == "kills":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "kills-once":
        marker = Path(rest[0])
        if not marker.exists():
            marker.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
    if name == "hogs":
        block = bytearray()
        for _ in range(400):
            block += os.urandom(1) * 10_000_000
            time.sleep(0.02)
    if name == "environment":
        return {name: os.environ.get(name) for name in rest}
    if name == "waits":
        for second in range(600):
            report(second, 600)
            time.sleep(0.05)
    for step in range(3):
        report(step + 1, 3)
    return unit.upper()
