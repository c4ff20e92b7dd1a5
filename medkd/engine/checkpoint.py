"""Checkpoints that survive a kill at any moment and resume bit-exactly on a CPU."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import pickle
import random
import re
import tempfile
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
import torch.distributed as dist
from ignite.engine import Events

from medkd.data.atomic import sync_folder
from medkd.engine.trainer import MethodTrainer, world_size
from medkd.errors import CheckpointError, TrainingError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_NAME = re.compile(r"step-(\d+)-([0-9a-f]{64})\.pt")


class Checkpoints:
    """Handler that saves everything a run needs to go on, and restores it when asked.

    A checkpoint is ``step-<iteration>-<sha256>.pt``, written under a temporary name, synced and renamed; ``last.pt``
    and ``best.pt`` are links replaced atomically. List it after :class:`Validate`, so that an epoch's checkpoint holds
    the epoch's validation.

    Args:
        folder: where checkpoints go; made if absent.
        every_epochs: save at the end of every so many epochs (always at the last).
        every_iters: save also every so many iterations.
        keep: newest checkpoints kept, at least 2; the best one stays besides.
        resume: restore the newest valid checkpoint before training.

    Raises:
        CheckpointError: If the folder holds checkpoints and ``resume`` is False; on resume, if none is valid or one
            does not fit the method exactly.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        every_epochs: int = 1,
        every_iters: int | None = None,
        keep: int = 2,
        resume: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.every_epochs = every_epochs
        self.every_iters = every_iters
        self.keep = max(keep, 2)
        self.resume = resume

    def attach(self, trainer: MethodTrainer) -> None:
        """Register on a trainer."""
        trainer.restorers.append(self.restore)
        trainer.save_checkpoint = self.save  # type: ignore[method-assign]
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._at_epoch)
        if self.every_iters:
            trainer.add_event_handler(Events.ITERATION_COMPLETED(every=self.every_iters), self._at_iteration)

    def _at_epoch(self, trainer: MethodTrainer) -> None:
        state = trainer.state
        due = state.epoch % self.every_epochs == 0 or trainer.finished
        if due or state.best_iteration == state.iteration:
            self.save(trainer)

    def _at_iteration(self, trainer: MethodTrainer) -> None:
        # The end of an epoch is saved after its validation, by _at_epoch.
        if trainer.state.iteration % trainer.state.epoch_length:
            self.save(trainer)

    def save(self, trainer: MethodTrainer) -> None:
        """Save now; with several processes only the first one writes.

        Raises:
            TrainingError: If a parameter is not finite, or the disk is full; earlier checkpoints stay.
        """
        trainer.average_buffers()
        if world_size() > 1 and dist.get_rank() != 0:
            return
        for name, parameter in trainer.method.named_parameters():
            if not torch.isfinite(parameter).all():
                raise TrainingError(
                    f"iteration {trainer.state.iteration}",
                    f"parameter {name} is not finite",
                    "lower the learning rate or set clip_norm; the last good checkpoint is kept",
                )
        is_best = trainer.state.best_iteration == trainer.state.iteration
        try:
            write_checkpoint(self.folder, training_state(trainer), trainer.state.iteration, is_best=is_best)
        except (OSError, RuntimeError) as error:
            # torch's zip writer turns a failed write into a RuntimeError.
            cause = error if isinstance(error, OSError) else error.__cause__ or error.__context__ or error
            if isinstance(error, OSError) or isinstance(cause, OSError) or "write" in str(error):
                full = getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
                raise TrainingError(
                    self.folder,
                    "the disk is full" if full else f"a checkpoint could not be written ({cause})",
                    "make room or fix the folder, then continue with --resume from the checkpoint before",
                ) from error
            raise
        prune_checkpoints(self.folder, self.keep)

    def restore(self, trainer: MethodTrainer) -> None:
        """Load the newest valid checkpoint into a trainer, or do nothing in an empty folder."""
        found = list_checkpoints(self.folder)
        if found and not self.resume:
            raise CheckpointError(self.folder, "it holds checkpoints of an earlier run", "resume it or use another")
        if found:
            path, state = load_newest(self.folder)
            load_training_state(trainer, state, path)
            if trainer.state.best_iteration == trainer.state.iteration:
                _replace_link(self.folder / "best.pt", path.name)  # a kill may have come before the link
            logger.info("resumed at iteration %d", trainer.state.iteration)


def training_state(trainer: MethodTrainer) -> dict[str, Any]:
    """Everything needed to go on: networks, optimizers, schedules, scalers, randomness, positions, best metric."""
    state = trainer.state
    streams = getattr(trainer.data_loader, "state_dict", None)
    return {
        "format_version": FORMAT_VERSION,
        "iteration": state.iteration,
        "epoch_length": state.epoch_length,
        "max_epochs": state.max_epochs,
        "updates": trainer.updates,
        "stopped_early": trainer.stopped_early,
        "best": {"metric": state.best_metric, "epoch": state.best_metric_epoch, "iteration": state.best_iteration},
        "method": trainer.method.state_dict(),
        "optimizers": {role: optimizer.state_dict() for role, optimizer in trainer.optimizers.items()},
        "lr_schedulers": {role: scheduler.state_dict() for role, scheduler in trainer.lr_schedulers.items()},
        "scalers": {role: scaler.state_dict() for role, scaler in trainer.scalers.items()},
        "streams": streams() if streams is not None else {},
        "rng": _rng_state(),
    }


def load_training_state(trainer: MethodTrainer, state: dict[str, Any], path: Path) -> None:
    """Put a saved state into a trainer, strictly.

    Raises:
        CheckpointError: If a key is missing or surplus, or a network, optimizer or schedule does not fit.
    """
    expected = set(training_state(trainer))
    if set(state) != expected:
        raise CheckpointError(
            path.name,
            f"missing {sorted(expected - set(state))}, surplus {sorted(set(state) - expected)}",
            "use an undamaged checkpoint of this version",
        )
    for what in ("epoch_length", "max_epochs"):
        now = getattr(trainer.state, what)
        if state[what] != now:
            raise CheckpointError(
                path.name, f"{what} was {state[what]} and is now {now}", "resume with the settings of the run"
            )
    try:
        trainer.method.load_state_dict(state["method"], strict=True)
        for kind in ("optimizers", "lr_schedulers", "scalers"):
            parts = getattr(trainer, kind)
            if set(parts) != set(state[kind]):
                raise ValueError(f"{kind} of {sorted(state[kind])} for {sorted(parts)}")
            for role, part in parts.items():
                if kind == "scalers" and bool(state[kind][role]) != part.is_enabled():
                    raise ValueError("the precision (amp) changed")
                part.load_state_dict(state[kind][role])
        if hasattr(trainer.data_loader, "load_state_dict"):
            trainer.data_loader.load_state_dict(state["streams"])
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(path.name, f"it does not fit this run ({reason})", "use this run's own config") from error
    trainer.load_state_dict(
        {"iteration": state["iteration"], "epoch_length": state["epoch_length"], "max_epochs": state["max_epochs"]}
    )
    trainer.updates = state["updates"]
    trainer.stopped_early = state["stopped_early"]
    trainer.state.best_metric = state["best"]["metric"]
    trainer.state.best_metric_epoch = state["best"]["epoch"]
    trainer.state.best_iteration = state["best"]["iteration"]
    _set_rng_state(state["rng"])


def write_checkpoint(folder: Path, state: dict[str, Any], iteration: int, *, is_best: bool) -> Path:
    """Write one checkpoint, whole or not at all, and point ``last.pt`` (and ``best.pt``) at it."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=".step-", suffix=".partial")
    try:
        with os.fdopen(descriptor, "wb") as file:
            writer = _HashingWriter(file)
            torch.save(state, cast(IO[bytes], writer))
            file.flush()
            os.fsync(file.fileno())
        path = folder / f"step-{iteration:08d}-{writer.digest}.pt"
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(folder)
    for link in ("last.pt", "best.pt") if is_best else ("last.pt",):
        _replace_link(folder / link, path.name)
    sync_folder(folder)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints by iteration, oldest first; what an interrupted save left behind is not one."""
    found = [path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: (int(path.name.split("-")[1]), path.stat().st_mtime_ns))


def load_newest(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint whose hash is right.

    Raises:
        CheckpointError: If there is none; damaged ones are passed over with a warning each.
    """
    for path in reversed(list_checkpoints(folder)):
        try:
            return path, read_checkpoint(path)
        except CheckpointError as error:
            logger.warning("%s", error)
    raise CheckpointError(folder, "it holds no valid checkpoint", "restore one from a backup, or start a new run")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load one checkpoint after checking its bytes against the hash in its name; never unpickles code.

    Raises:
        CheckpointError: If the name, the hash or the content is wrong.
    """
    path = path.resolve()
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(path.name, "this is not a checkpoint name", "expected step-<iteration>-<sha256>.pt")
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != match[2]:
            raise CheckpointError(path.name, "its content does not match its SHA-256", "an earlier one is needed")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            path.name, f"it cannot be read ({type(error).__name__})", "an earlier one is needed"
        ) from error
    if not isinstance(state, dict) or state.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(path.name, "it is of another format version", "use the medkd version that wrote it")
    return state


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints and what ``best.pt`` points at, and stale partial files."""
    best = (folder / "best.pt").resolve()
    for path in list_checkpoints(folder)[:-keep]:
        if path.resolve() != best:
            path.unlink()
    for partial in folder.glob(".step-*.partial"):
        partial.unlink()


class _HashingWriter:
    """A file to ``torch.save`` that hashes what passes through."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = hashlib.sha256()

    def write(self, data: Any) -> int:
        self._hash.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


def _replace_link(link: Path, target: str) -> None:
    temporary = link.with_name(f".{link.name}.partial")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)


def _rng_state() -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, cached = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [
            name,
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ],
        "python": [version, list(internal), cached],
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, cached = state["python"]
    random.setstate((version, tuple(internal), cached))
