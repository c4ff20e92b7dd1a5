"""The folder of one training run: made before training, kept consistent, used by one process at a time."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from medkd.data.atomic import atomic_write
from medkd.data.datalists import Datalist, read_datalist, write_datalist
from medkd.errors import ConfigError, InputError

FORMAT_VERSION = 1
CONFIG, DATALIST, ENVIRONMENT, LOG = "config.json", "datalist.json", "environment.json", "log.txt"
OWN_OR_NEW = "resume with the run's own, or start anew"
_KEPT = frozenset({".lock", "data"})  # data: a run may hold its own, as the quickstart's does
# What may differ between a run and its resumption without changing its result.
_FREE_KEYS = frozenset({"resume", "run_dir", "output_weights", "num_workers", "bundle_root"})


@contextmanager
def hold_run_folder(run_dir: Path) -> Iterator[None]:
    """Keep every other process out of a run folder; the lock ends with the process, however it ends.

    Raises:
        ConfigError: If another process is training there.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                run_dir, "another process is training there", "wait for it or use another --run-dir"
            ) from None
        yield


def require_free(run_dir: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a used folder without ``--resume`` or ``--overwrite``, and ``--resume`` without a run.

    Raises:
        ConfigError: as said.
    """
    used = run_dir.exists() and any(path.name not in _KEPT for path in run_dir.iterdir())
    if used and not (resume or overwrite):
        raise ConfigError(run_dir, "is not empty", "pass --resume to go on with it, or --overwrite to start again")
    if resume and not (run_dir / CONFIG).is_file():
        raise ConfigError(run_dir, "holds no run to resume", "start one without --resume")
    if used and overwrite and not resume and not (run_dir / CONFIG).is_file():
        raise ConfigError(run_dir, "is not a run folder, so it is not overwritten", "choose an empty folder")


def clear(run_dir: Path) -> None:
    """Remove an earlier run, keeping the lock and the run's own data."""
    for path in run_dir.iterdir():
        if path.name in _KEPT:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_identity(run_dir: Path, config: Mapping[str, Any], datalist: Datalist | None) -> None:
    """Write what makes this run this run: config.json, datalist.json, format_version and environment.json."""
    if datalist is not None:
        copied = datalist.model_copy()
        write_datalist(copied, run_dir / DATALIST)
    _write_json(run_dir / ENVIRONMENT, environment())
    with atomic_write(run_dir / "format_version") as file:
        file.write(f"{FORMAT_VERSION}\n")
    _write_json(run_dir / CONFIG, config)  # last: a folder with it is a run


def require_same_run(run_dir: Path, config: Mapping[str, Any], datalist: Datalist | None) -> None:
    """Refuse to resume with another configuration or datalist, showing the difference.

    Raises:
        ConfigError: naming up to three differences.
    """
    before = json.loads((run_dir / CONFIG).read_text(encoding="utf-8"))
    differences = list(_differences(_identity(before), _identity(config)))
    if differences:
        shown = ", ".join(differences[:3]) + (f" and {len(differences) - 3} more" if len(differences) > 3 else "")
        raise ConfigError(run_dir, f"the configuration changed: {shown}", OWN_OR_NEW)
    if datalist is not None and (run_dir / DATALIST).is_file():
        try:
            old = read_datalist(run_dir / DATALIST, datalist.dataset_dir, check_files=False)
        except InputError:
            old = read_datalist(run_dir / DATALIST, check_files=False)
        difference = old.difference(datalist)
        if difference:
            raise ConfigError(
                run_dir, f"the datalist changed: {difference}", "resume with the run's own, or start anew"
            )


def environment() -> dict[str, Any]:
    """Versions and hardware of this run; no user or host names."""
    packages = ("medkd", "torch", "monai", "numpy", "scipy", "nibabel", "pytorch-ignite")
    versions: dict[str, Any] = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": versions,
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "command": " ".join(["medkd", *sys.argv[1:]]) if Path(sys.argv[0]).stem in {"medkd", "__main__"} else None,
    }


@contextmanager
def log_to(run_dir: Path) -> Iterator[None]:
    """Also write what medkd and MONAI log to log.txt."""
    handler = logging.FileHandler(run_dir / LOG, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    package = logging.getLogger("medkd")
    before = package.level
    package.setLevel(min(before or logging.INFO, logging.INFO))
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(before)
        handler.close()


def _write_json(path: Path, content: Any) -> None:
    with atomic_write(path) as file:
        json.dump(content, file, indent=2)
        file.write("\n")


def _identity(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _FREE_KEYS}


def _differences(before: Any, after: Any, where: str = "") -> Iterator[str]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in sorted({*before, *after}):
            yield from _differences(before.get(key), after.get(key), f"{where}::{key}" if where else str(key))
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from _differences(old, new, f"{where}::{index}")
    elif before != after:
        yield f"{where} was {json.dumps(before)} and is {json.dumps(after)}"
