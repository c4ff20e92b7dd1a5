"""``medkd doctor``: what is installed, what it can compute on, what is missing and the command that adds it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

_EXTRAS = {
    "dicom-seg": "DICOM-SEG output of `medkd predict`",
    "benchmark": "the peers that benchmarks/ compares with",
    "dev": "tests and checks of medkd itself",
}
_SHOWN = ("torch", "monai", "numpy", "scipy", "nibabel", "SimpleITK", "pydicom", "pytorch-ignite", "onnxruntime")
_LOW_DISK_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Fact:
    """One line of the doctor's report.

    Attributes:
        group: ``versions``, ``devices``, ``extras`` or ``installation``.
        name: of what.
        value: what was found.
        state: ``ok``, ``note`` (optional and absent) or ``finding``.
        remedy: what to do; empty when all is well.
    """

    group: str
    name: str
    value: str
    state: str = "ok"
    remedy: str = ""


def examine() -> list[Fact]:
    """Look at the installation and the machine; nothing is changed."""
    return [*_versions(), *_devices(), *_extras(), *_installation()]


def _versions() -> Iterator[Fact]:
    yield Fact("versions", "medkd", importlib.metadata.version("medkd"))
    yield Fact("versions", "python", platform.python_version())
    requirements = [Requirement(text) for text in importlib.metadata.requires("medkd") or []]
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version(requirement.name)
        command = f"pip install '{requirement.name}{requirement.specifier}'"
        if found is None:
            yield Fact("versions", requirement.name, "missing", "finding", command)
        elif not requirement.specifier.contains(found, prereleases=True):
            yield Fact("versions", requirement.name, f"{found}, needs {requirement.specifier}", "finding", command)
        elif requirement.name in _SHOWN:
            yield Fact("versions", requirement.name, found)
    yield from _broken_torchvision()


def _broken_torchvision() -> Iterator[Fact]:
    """A torchvision of another torch build breaks at import, and with it what imports it."""
    found = _version("torchvision")
    if found is None:
        return
    problem = _problem(lambda: importlib.import_module("torchvision"))
    if problem is not None:
        remedy = "pip uninstall torchvision (medkd does not use it), or install the build that matches torch"
        yield Fact("versions", "torchvision", f"{found}, broken: {problem}", "finding", remedy)


def _devices() -> Iterator[Fact]:
    import torch

    memory = _memory_bytes()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = f"{cores} core{'s' if cores > 1 else ''}" + (f", {memory / 2**30:.0f} GiB" if memory else "")
    yield Fact(
        "devices", "cpu", f"{text}, torch uses {torch.get_num_threads()}, {torch.backends.cpu.get_cpu_capability()}"
    )
    if not torch.cuda.is_available():
        built = torch.version.cuda or getattr(torch.version, "hip", None)
        reason = "no usable GPU or driver" if built else "this torch is a CPU build"
        remedy = "nothing needs a GPU; with one, install the matching build from pytorch.org"
        yield Fact("devices", "gpu", f"none: {reason}", "note", remedy)
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        half = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        yield Fact("devices", f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {half}")


def _extras() -> Iterator[Fact]:
    requirements = [Requirement(text) for text in importlib.metadata.requires("medkd") or []]
    for extra, purpose in _EXTRAS.items():
        wanted = [
            requirement
            for requirement in requirements
            if requirement.marker is not None and requirement.marker.evaluate({"extra": extra})
        ]
        missing = [requirement.name for requirement in wanted if _version(requirement.name) is None]
        if missing:
            command = f"pip install 'medkd[{extra}]'"
            yield Fact("extras", extra, f"absent ({', '.join(missing)}): {purpose}", "note", command)
        else:
            yield Fact("extras", extra, purpose)


def _installation() -> Iterator[Fact]:
    from medkd.data.cards import list_cards
    from medkd.deploy.metadata import license_text
    from medkd.deploy.windows import sample_volume
    from medkd.workflows.bundles import list_bundles

    reinstall = "install medkd again"
    parts: dict[str, tuple[Callable[[], object], str]] = {
        "bundles": (list_bundles, reinstall),
        "dataset cards": (list_cards, reinstall),
        "licence": (license_text, reinstall),
        "MNI152 template": (sample_volume, "pip install --force-reinstall nilearn"),
    }
    for name, (look, remedy) in parts.items():
        problem = _problem(look)
        if problem is None:
            found = look()
            yield Fact("installation", name, f"{len(found)} found" if isinstance(found, list) else "found")
        else:
            yield Fact("installation", name, problem, "finding", remedy)
    free = shutil.disk_usage(Path.cwd()).free
    low = free < _LOW_DISK_BYTES
    remedy = "make room, or work in another folder" if low else ""
    yield Fact("installation", "free disk", f"{free / 2**30:.1f} GiB here", "finding" if low else "ok", remedy)
    problem = _problem(lambda: tempfile.TemporaryFile().close())
    if problem is not None:
        yield Fact("installation", "temporary files", problem, "finding", "set TMPDIR to a folder you may write to")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _problem(look: Callable[[], object]) -> str | None:
    try:
        look()
    except Exception as error:
        lines = str(error).splitlines()
        return lines[0][:120] if lines else type(error).__name__
    return None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
