"""What became of every slide of a run, kept beside the outputs so that a later run can go on.

Each slide ends in exactly one :data:`Status`. Its record lies in ``<out>/.state/slides/<name>.json`` and is written
after all its output files, so a slide with a record of success is complete. A record holds the slide's key: the hash
of everything the outputs depend on. Outputs are used again only under an equal key and when all their files are there.

Work on a slide goes on in a staging folder in ``.state``; only what is finished is moved to the output folder, after
a list of it (``<name>.files``) was written, so that whatever a killed process leaves can be found and removed.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from medkd import __version__
from medkd.data.atomic import atomic_write, sync_folder
from medkd.errors import ConfigError

Status = Literal["done", "empty-tissue", "unreadable", "no-mpp", "failed"]
SUCCESSES: tuple[Status, ...] = ("done", "empty-tissue")
FORMAT_VERSION = 1
STATE_FOLDER = ".state"
_SLIDES, _RUN_FILE = "slides", "run.json"


@dataclass(frozen=True)
class SlideRecord:
    """How one slide ended.

    Attributes:
        name: of its outputs.
        status: see the module.
        setup: hash of model and parameters.
        key: hash of slide and setup; empty where the slide could not be read.
        reason: why it failed, in one line; empty for a success.
        files: output file name → size in bytes.
        tiles: how many tiles its tissue has.
        failed_tiles: how many of them could not be read.
        mpp: of the slide, level 0, µm per pixel.
        seconds: of work.
        deaths: workers that died of it.
        reused: whether an earlier run had finished it; not written.
        disk_is_full: whether it failed because nothing more could be written; not written.
        notes: warnings, for the log; not written.
        details: traceback of a fault, for the log; not written.
    """

    name: str
    status: Status
    setup: str = ""
    key: str = ""
    reason: str = ""
    files: Mapping[str, int] = field(default_factory=dict)
    tiles: int | None = None
    failed_tiles: int | None = None
    mpp: float | None = None
    seconds: float = 0.0
    deaths: int = 0
    reused: bool = False
    disk_is_full: bool = False
    notes: tuple[str, ...] = ()
    details: str = ""

    @property
    def is_success(self) -> bool:
        """Whether the slide needs no further work."""
        return self.status in SUCCESSES


def setup_hash(model: str, parameters: Mapping[str, Any]) -> str:
    """Hash of all but the slide that outputs depend on, medkd's own version included.

    Args:
        model: hash of the weights and of the configuration they run in; empty without a model.
        parameters: JSON values.
    """
    content = {"format": FORMAT_VERSION, "medkd": __version__, "model": model, "parameters": parameters}
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def slide_key(fingerprint: str, setup: str) -> str:
    """Hash of all that the outputs of a slide depend on."""
    return hashlib.sha256(f"{fingerprint} {setup}".encode()).hexdigest()


def read_record(out: Path, name: str) -> SlideRecord | None:
    """The record of a slide; None where there is none that can be read."""
    try:
        content = json.loads(_record_file(out, name).read_text(encoding="utf-8"))
        if content.pop("format_version") != FORMAT_VERSION:
            return None
        record = SlideRecord(**content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    has_files = isinstance(record.files, dict) and all(map(_is_plain_name, record.files))
    return record if record.name == name and record.status in get_args(Status) and has_files else None


def write_record(out: Path, record: SlideRecord) -> None:
    """Write a slide's record."""
    content = {"format_version": FORMAT_VERSION, **dataclasses.asdict(record)}
    for passing in ("reused", "disk_is_full", "notes", "details"):
        del content[passing]
    with atomic_write(_record_file(out, record.name)) as file:
        json.dump(content, file, indent=1, allow_nan=False)
        file.write("\n")


def is_complete(out: Path, record: SlideRecord | None, key: str) -> bool:
    """Whether a record is of a success under this key, and all its files are there in their size."""
    return (
        record is not None
        and record.is_success
        and record.key == key
        and all(_size(out / file) == size for file, size in record.files.items())
    )


def forget(out: Path, name: str) -> None:
    """Remove what earlier work on a slide left: first the record, then the files, also half-written ones."""
    record = read_record(out, name)
    record_file, list_file = _record_file(out, name), _list_file(out, name)
    files = {*(record.files if record is not None else ()), *_listed(list_file)}
    record_file.unlink(missing_ok=True)
    for file in files:
        path = out / file
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    list_file.unlink(missing_ok=True)
    discard_unfinished(out, name)


def discard_unfinished(out: Path, name: str) -> None:
    """Remove work on a slide that a killed process could not finish."""
    folder = out / STATE_FOLDER / _SLIDES
    half_written = re.compile(re.escape(f".{name}.") + r"(json|files)\..*\.partial")
    unfinished = re.compile(re.escape(f"{name}.work-") + r"[0-9a-f]{8}")
    for path in folder.iterdir() if folder.is_dir() else ():
        if unfinished.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
        elif half_written.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextmanager
def staging(out: Path, name: str) -> Iterator[Path]:
    """A new folder, on the same disk as ``out``, for work that is not finished; it is removed in any case."""
    folder = out / STATE_FOLDER / _SLIDES / f"{name}.work-{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(staged: Path, out: Path, name: str) -> dict[str, int]:
    """Move all that lies in a slide's staging folder to ``out``, each file in one rename, ``<name>.json`` last.

    Returns:
        Name → size in bytes, of files; of folders the number of entries.
    """
    paths = sorted(staged.iterdir(), key=lambda path: (path.name == f"{name}.json", path.name))
    with atomic_write(_list_file(out, name)) as file:
        json.dump([path.name for path in paths], file)
    published: dict[str, int] = {}
    for path in paths:
        target = out / path.name
        if path.is_dir():
            shutil.rmtree(target, ignore_errors=True)
        os.replace(path, target)
        published[path.name] = _size(target)
    sync_folder(out)
    return published


def prepare_out(
    out: Path, identity: Mapping[str, Any], names: Sequence[str], *, resume: bool, overwrite: bool, shared: bool
) -> None:
    """Make the output folder of a run, or refuse it.

    Args:
        out: the folder.
        identity: what the run is: JSON values that all its shards share.
        names: of the slides this process works on.
        resume: go on in a folder of an earlier run, whatever its parameters were.
        overwrite: begin again; records of the slides are removed.
        shared: this is one of several shards, which may find the folder in use by the others.

    Raises:
        ConfigError: It is not empty, or cannot be written to.
    """
    if resume and overwrite:
        raise ConfigError("--resume", "and --overwrite exclude each other", "pass one of them")
    if out.exists() and not out.is_dir():
        raise ConfigError(out, "is a file", "choose a folder")
    state = out / STATE_FOLDER
    try:
        if not overwrite and out.is_dir():
            _require_usable(out, identity, names, resume=resume, shared=shared)
        (state / _SLIDES).mkdir(parents=True, exist_ok=True)
        if overwrite:
            for name in names:
                forget(out, name)
        with atomic_write(state / _RUN_FILE) as file:
            json.dump(identity, file, indent=1)
    except OSError as error:
        remedy = "choose another folder, or free some space"
        raise ConfigError(out, f"cannot be written to ({error.strerror})", remedy) from None


def _require_usable(
    out: Path, identity: Mapping[str, Any], names: Sequence[str], *, resume: bool, shared: bool
) -> None:
    entries = {path.name for path in out.iterdir()}
    records = out / STATE_FOLDER / _SLIDES
    if entries <= {STATE_FOLDER} and not (records.is_dir() and any(records.iterdir())):
        return  # nothing was done there yet
    if not is_run(out):
        if resume:
            raise ConfigError(out, "holds no run to resume", "choose an empty folder, or pass --overwrite")
        raise ConfigError(out, "is not empty", "choose another folder, or pass --overwrite")
    if resume or (shared and _is_of(out, identity) and not any(_record_file(out, name).exists() for name in names)):
        return
    raise ConfigError(out, "is not empty", "pass --resume to go on with it, or --overwrite to start again")


def is_run(out: Path) -> bool:
    """Whether a folder was prepared for a run."""
    return (out / STATE_FOLDER / _RUN_FILE).is_file()


def _is_of(out: Path, identity: Mapping[str, Any]) -> bool:
    try:
        return bool(json.loads((out / STATE_FOLDER / _RUN_FILE).read_text(encoding="utf-8")) == identity)
    except (OSError, ValueError):
        return False


@contextmanager
def hold(out: Path, shard: tuple[int, int] | None) -> Iterator[None]:
    """Keep out a second process that would do the same work; the locks end with the process, however it ends.

    Raises:
        ConfigError: There is one.
    """
    state = out / STATE_FOLDER
    with (state / "lock").open("w") as whole:
        _lock(whole, out, exclusive=shard is None)
        if shard is None:
            yield
            return
        with (state / f"lock-{shard[0]}-of-{shard[1]}").open("w") as own:
            _lock(own, out, exclusive=True)
            yield


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Wait until no other shard is writing the tables of the whole run."""
    with (out / STATE_FOLDER / "lock-tables").open("w") as file:
        with suppress(OSError):  # a file system without locks: the tables are still written in one rename each
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _lock(file: Any, out: Path, *, exclusive: bool) -> None:
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(out, "another process is at work there", "wait for it, or use another --out") from None
    except OSError:  # a file system without locks: every file is written in one rename, so the harm is double work
        pass


def _record_file(out: Path, name: str) -> Path:
    return out / STATE_FOLDER / _SLIDES / f"{name}.json"


def _list_file(out: Path, name: str) -> Path:
    return out / STATE_FOLDER / _SLIDES / f"{name}.files"


def _listed(file: Path) -> list[str]:
    try:
        names = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [name for name in names if _is_plain_name(name)] if isinstance(names, list) else []


def _size(path: Path) -> int:
    """Bytes of a file, entries of a folder, -1 for nothing."""
    try:
        return len(list(path.iterdir())) if path.is_dir() else path.stat().st_size
    except OSError:
        return -1


def _is_plain_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name
