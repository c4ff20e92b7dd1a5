"""The bundles medkd ships, copies of them, and whether a bundle is fit to be handed on."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from medkd.data.shipped import shipped_folder
from medkd.deploy.bundle import WEIGHTS, WEIGHTS_HASH, bundle_folder, load_bundle, write_folder
from medkd.deploy.metadata import SCHEMA
from medkd.deploy.trust import Code, bundle_sha256, list_code, read_config
from medkd.errors import ConfigError, MedkdError
from medkd.workflows.failures import one_line

_LICENCES = {
    "Apache-2.0": ("Apache License", "Version 2.0"),
    "MIT": ("Permission is hereby granted, free of charge",),
    "BSD": ("Redistribution and use in source and binary forms",),
}


@dataclass(frozen=True)
class ShippedBundle:
    """A bundle that comes with medkd.

    Attributes:
        name: its folder's name.
        task: from its metadata.
        description: from its metadata.
        version: from its metadata.
        path: where it lies.
    """

    name: str
    task: str
    description: str
    version: str
    path: Path


@dataclass(frozen=True)
class Check:
    """One check of a bundle.

    Attributes:
        name: what was checked.
        state: ``ok``, ``finding``, or ``note`` for what could not be checked.
        message: what was found.
    """

    name: str
    state: str
    message: str


@dataclass(frozen=True)
class BundleReport:
    """What ``bundle check`` found.

    Attributes:
        path: the bundle.
        sha256: over all its files; what ``--trust`` takes. Empty where it cannot be computed.
        checks: in the order they were made.
        code: every piece of code its configurations would run.
    """

    path: Path
    sha256: str
    checks: list[Check]
    code: list[Code]

    @property
    def findings(self) -> list[Check]:
        """The checks that found something."""
        return [check for check in self.checks if check.state == "finding"]


def list_bundles() -> list[ShippedBundle]:
    """The bundles that come with this installation, by name."""
    found = []
    for folder in sorted(shipped_folder("bundles").iterdir()):
        if (folder / "configs" / "metadata.json").is_file():
            metadata = read_config(folder / "configs" / "metadata.json")
            task, description, version = (str(metadata.get(key, "")) for key in ("task", "description", "version"))
            found.append(ShippedBundle(folder.name, task, description, version, folder))
    return found


def copy_bundle(name: str, out: str | Path) -> Path:
    """Copy a shipped bundle into a folder that is absent or empty.

    Returns:
        The copy.

    Raises:
        ConfigError: No such bundle, or the folder is not empty.
    """
    bundles = {bundle.name: bundle for bundle in list_bundles()}
    if name not in bundles:
        near = get_close_matches(name, bundles, n=1)
        remedy = f"did you mean {near[0]}?" if near else "`medkd bundle list` shows all"
        raise ConfigError(f"bundle {name}", "is not among those shipped", remedy)
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(out, "is not empty", "choose another folder")
    source = bundles[name].path
    files = [file for file in sorted(source.rglob("*")) if file.is_file() and "__pycache__" not in file.parts]
    write_folder(out, {file.relative_to(source).as_posix(): file.read_bytes() for file in files})
    return out


def check_bundle(path: str | Path, *, trust: str | None = None) -> BundleReport:
    """Run MONAI's own verifications offline, and look at licence, weights and code.

    Nothing the bundle brings is executed unless its code is on the allow-list or ``trust`` is its hash.

    Raises:
        ConfigError: There is no bundle, or ``trust`` is not its hash.
    """
    root = bundle_folder(path)
    try:
        digest = bundle_sha256(root)
    except MedkdError:
        digest = ""
    if trust is not None and trust.strip().lower() != digest:
        raise ConfigError("--trust", f"is not the hash of the files in {root}", f"it is {digest or 'not computable'}")
    code = list_code(root)
    checks = [_check_files(root), _check_metadata(root), _check_licence(root)]
    beyond = [piece for piece in code if piece.problem]
    if beyond and trust is None:
        checks.append(Check("code", "finding", f"{len(beyond)} of {len(code)} pieces are beyond the allow-list"))
        checks.append(Check("network", "note", "not built: its configuration is not trusted"))
    else:
        message = f"{len(code)} pieces, all on the allow-list" if not beyond else f"{len(code)} pieces, trusted by hash"
        checks.append(Check("code", "ok", message))
        checks.append(_check_network(root))
    checks.append(_check_weights(root, trust, buildable=not beyond or trust is not None))
    return BundleReport(root, digest, checks, code)


def _check_files(root: Path) -> Check:
    missing = [name for name in ("configs/metadata.json", "docs/README.md") if not (root / name).is_file()]
    if not any((root / "configs" / f"inference.{suffix}").is_file() for suffix in ("json", "yaml", "yml")):
        missing.append("configs/inference.json")
    if "_v" in root.name:
        return Check("files", "finding", f"MONAI cuts names at '_v': rename {root.name}")
    if missing:
        return Check("files", "finding", f"missing: {', '.join(missing)}")
    return Check("files", "ok", "all that the model zoo asks for")


def _check_metadata(root: Path) -> Check:
    from monai.bundle.scripts import verify_metadata

    file = root / "configs" / "metadata.json"
    if not file.is_file():
        return Check("metadata", "finding", "configs/metadata.json is missing")
    with tempfile.TemporaryDirectory() as folder:
        schema = Path(folder, "schema.json")
        schema.write_text(json.dumps(SCHEMA))  # where MONAI looks before it downloads
        problem = _quietly(lambda: verify_metadata(meta_file=str(file), filepath=str(schema)))
    return _as_check("metadata", problem, "fits the schema of 2024-07-25")


def _check_network(root: Path) -> Check:
    from monai.bundle.scripts import verify_net_in_out

    config = next(iter(sorted((root / "configs").glob("inference.*"))), None)
    meta = root / "configs" / "metadata.json"
    if config is None or not meta.is_file():
        return Check("network", "finding", "cannot be built without inference.json and metadata.json")
    problem = _quietly(
        lambda: verify_net_in_out(
            net_id="network_def", meta_file=str(meta), config_file=str(config), device="cpu", bundle_root=str(root)
        )
    )
    return _as_check("network", problem, "takes and gives what the metadata says")


def _check_licence(root: Path) -> Check:
    file = root / "LICENSE"
    if not file.is_file():
        return Check("licence", "finding", "LICENSE is missing")
    text = file.read_text(encoding="utf-8", errors="replace")
    for name, marks in _LICENCES.items():
        if all(mark in text for mark in marks):
            return Check("licence", "ok", name)
    return Check("licence", "note", "not one we recognize: read LICENSE")


def _check_weights(root: Path, trust: str | None, *, buildable: bool) -> Check:
    found = [root / "models" / name for name in WEIGHTS if (root / "models" / name).is_file()]
    if not found:
        return Check("weights", "note", "none: train the bundle before predicting with it")
    with open(found[0], "rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    title = f"{found[0].name} sha256 {digest}"
    if not buildable:
        return Check("weights", "note", f"{title}, not loaded")
    try:
        bundle = load_bundle(root, trust=trust)
    except MedkdError as error:
        return Check("weights", "finding", f"{title}: {error.problem}")
    recorded = isinstance(bundle.metadata.get(WEIGHTS_HASH), dict) and found[0].name in bundle.metadata[WEIGHTS_HASH]
    return Check("weights", "ok", f"{title}{', as in metadata.json' if recorded else ', fits network_def'}")


def _as_check(name: str, problem: str | None, good: str) -> Check:
    return Check(name, "ok", good) if problem is None else Check(name, "finding", problem)


def _quietly(verify: Callable[[], Any]) -> str | None:
    """Run one of MONAI's verifications without its output; the problem it found, if any."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            verify()
    except (Exception, SystemExit) as error:
        return one_line(error)
    finally:
        logging.disable(logging.NOTSET)
    return None
