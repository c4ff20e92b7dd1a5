"""Handlers of a training run: validation, metrics log, progress and signals."""

from __future__ import annotations

import csv
import io
import logging
import math
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Events
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from medkd.data.atomic import atomic_write
from medkd.engine.processes import is_main_process
from medkd.engine.trainer import MethodTrainer, world_size
from medkd.errors import ConfigError, TrainingPaused

logger = logging.getLogger(__name__)

METRIC_COLUMNS = ("iteration", "epoch", "split", "name", "value")


class Validate:
    """Run an evaluator on the deployed network and remember the best epoch; stop early if asked.

    Only a finite metric can become the best. List it before :class:`MetricsLog` and :class:`Checkpoints`.

    Args:
        evaluator: a MONAI evaluator of the deployed network.
        every_epochs: validate at the end of every so many epochs, and at the last.
        metric: the metric that decides, larger is better; by default the evaluator's key metric.
        patience: stop after so many epochs without a new best, or never.
    """

    def __init__(
        self, evaluator: Any, *, every_epochs: int = 1, metric: str | None = None, patience: int | None = None
    ) -> None:
        self.evaluator = evaluator
        self.every_epochs = every_epochs
        self.metric = metric
        self.patience = patience

    def attach(self, trainer: MethodTrainer) -> None:
        """Register on a trainer."""
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._validate)

    def _validate(self, trainer: MethodTrainer) -> None:
        state = trainer.state
        if state.epoch % self.every_epochs and not trainer.finished:
            return
        trainer.average_buffers()
        if not self.evaluator.state.epoch_length:
            return  # the datalist has no validation cases
        self.evaluator.run(state.epoch)
        trainer.method.train()
        metrics = {name: float(value) for name, value in self.evaluator.state.metrics.items() if _is_number(value)}
        state.metrics.update(metrics)
        name = self.metric or self.evaluator.state.key_metric_name
        if name is None:
            return
        if name not in metrics:
            raise ConfigError("validate", f"the evaluator has no metric {name!r}", f"use one of {sorted(metrics)}")
        value = metrics[name]
        if math.isfinite(value) and (state.best_metric_epoch == -1 or value > state.best_metric):
            state.best_metric, state.best_metric_epoch = value, state.epoch
            state.best_iteration = state.iteration
        since = state.epoch - max(state.best_metric_epoch, 0)
        if self.patience is not None and since >= self.patience:
            logger.info("no better %s for %d epochs: stopping", name, since)
            trainer.stopped_early = True
            trainer.terminate()


class MetricsLog:
    """Write loss terms and validation metrics to ``metrics.csv`` and TensorBoard in the run folder.

    Args:
        run_dir: the run folder; made if absent.
        every_iters: log the loss terms every so many iterations.
        tensorboard: also write TensorBoard events.
    """

    def __init__(self, run_dir: str | Path, *, every_iters: int = 10, tensorboard: bool = True) -> None:
        self.run_dir = Path(run_dir)
        self.every_iters = every_iters
        self.tensorboard = tensorboard
        self._writer: Any = None
        self._validated = 0

    def attach(self, trainer: MethodTrainer) -> None:
        """Register on a trainer; with several processes only the first one writes."""
        if not is_main_process():
            return
        trainer.add_event_handler(Events.STARTED, self._start)
        trainer.add_event_handler(Events.ITERATION_COMPLETED(every=self.every_iters), self._log_training)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._log_validation)
        trainer.add_event_handler(Events.COMPLETED, self._close)

    @property
    def path(self) -> Path:
        """The CSV file."""
        return self.run_dir / "metrics.csv"

    def _start(self, trainer: MethodTrainer) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        iteration = trainer.state.iteration
        kept: list[list[str]] = []
        if self.path.exists() and iteration:
            with self.path.open(newline="", encoding="utf-8") as file:
                # A kill may have cut the last line; what came after the checkpoint will be computed again.
                rows = [row for row in csv.reader(file) if len(row) == len(METRIC_COLUMNS)]
            kept = [row for row in rows[1:] if row[0].isdigit() and int(row[0]) <= iteration]
        with atomic_write(self.path) as file:
            csv.writer(file).writerows([list(METRIC_COLUMNS), *kept])
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # imported late: it takes a second

            self._writer = SummaryWriter(str(self.run_dir), purge_step=iteration + 1 if iteration else None)

    def _log_training(self, trainer: MethodTrainer) -> None:
        output = trainer.state.output
        if isinstance(output, dict):
            values = {name: float(value) for name, value in output.items() if _is_number(value)}
            rates = {f"lr_{role}": float(o.param_groups[0]["lr"]) for role, o in trainer.optimizers.items()}
            self._write(trainer, "train", values | rates)

    def _log_validation(self, trainer: MethodTrainer) -> None:
        self._write(trainer, "validation", {name: float(v) for name, v in trainer.state.metrics.items()})
        trainer.state.metrics = {}

    def _write(self, trainer: MethodTrainer, split: str, values: dict[str, float]) -> None:
        state = trainer.state
        lines = io.StringIO()
        csv.writer(lines).writerows([state.iteration, state.epoch, split, k, repr(v)] for k, v in values.items())
        with self.path.open("a", newline="", encoding="utf-8") as file:
            file.write(lines.getvalue())
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{split}/{name}", value, state.iteration)

    def _close(self, trainer: MethodTrainer) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class SaveWeights:
    """Write the deployed network's plain ``state_dict`` when training is done, for the bundle that ships it.

    Args:
        out: usually ``models/model.pt`` of a bundle; its folder is made if absent.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out)

    def attach(self, trainer: MethodTrainer) -> None:
        """Register on a trainer; with several processes only the first one writes."""
        if is_main_process():
            trainer.add_event_handler(Events.COMPLETED, self._save)

    def _save(self, trainer: MethodTrainer) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().cpu().contiguous() for name, value in trainer.network.state_dict().items()}
        with atomic_write(self.out, "wb") as file:
            torch.save(state, file)


class Progress:
    """Show loss terms and time left on stderr: a bar on a terminal, plain lines otherwise.

    Args:
        title: what is being trained.
        seconds: time between plain lines.
    """

    def __init__(self, title: str = "training", *, seconds: float = 10.0) -> None:
        self.title = title
        self.seconds = seconds
        self._bar: ProgressBar | None = None
        self._task: Any = None
        self._started = self._spoken = 0.0
        self._first = 0

    def attach(self, trainer: MethodTrainer) -> None:
        """Register on a trainer; with several processes only the first one speaks."""
        if not is_main_process():
            return
        trainer.add_event_handler(Events.STARTED, self._start)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._advance)
        trainer.add_event_handler(Events.COMPLETED | Events.EXCEPTION_RAISED | Events.TERMINATE, self._stop)

    def _start(self, trainer: MethodTrainer) -> None:
        self._started = self._spoken = time.monotonic()
        self._first = trainer.state.iteration
        if sys.stderr.isatty():
            self._bar = ProgressBar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[terms]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            total = trainer.state.epoch_length * trainer.state.max_epochs
            self._task = self._bar.add_task(self.title, total=total, completed=self._first, terms="")
            self._bar.start()

    def _advance(self, trainer: MethodTrainer) -> None:
        state, now = trainer.state, time.monotonic()
        if self._bar is not None:
            if now - self._spoken > 0.5:
                self._spoken = now
                self._bar.update(self._task, terms=_terms(state.output))
            self._bar.update(self._task, completed=state.iteration)
        elif now - self._spoken >= self.seconds:
            self._spoken = now
            total = state.epoch_length * state.max_epochs
            left = (now - self._started) / (state.iteration - self._first) * (total - state.iteration)
            logger.info(
                "%s: iteration %d of %d, epoch %d, %s, about %s left",
                self.title, state.iteration, total, state.epoch, _terms(state.output), _duration(left),
            )  # fmt: skip

    def _stop(self, trainer: MethodTrainer, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class PauseOnSignal:
    """Finish the step and save when asked to stop, so that the run continues with ``--resume``.

    SIGTERM and SIGUSR1 raise :class:`TrainingPaused` after saving, SIGINT raises KeyboardInterrupt after saving; a
    second SIGINT does not wait. Needs :class:`Checkpoints` on the same trainer.
    """

    def __init__(self) -> None:
        self._received: int = 0
        self._previous: dict[int, Any] = {}

    def attach(self, trainer: MethodTrainer) -> None:
        """Register on a trainer; signals are caught only while it runs, in the main thread."""
        trainer.add_event_handler(Events.STARTED, self._install)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._check_iteration)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._check)
        trainer.add_event_handler(Events.COMPLETED | Events.TERMINATE, self._uninstall)

    def _install(self, trainer: MethodTrainer) -> None:
        self._received = 0
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)

    def _uninstall(self, trainer: MethodTrainer) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number

    def _check_iteration(self, trainer: MethodTrainer) -> None:
        # At the end of an epoch, validation comes first.
        if trainer.state.iteration % trainer.state.epoch_length:
            self._check(trainer)

    def _check(self, trainer: MethodTrainer) -> None:
        received = self._received
        if world_size() > 1:
            shared = torch.tensor(received, device=trainer.state.device)
            dist.all_reduce(shared, op=dist.ReduceOp.MAX)
            received = int(shared)
        if not received or trainer.finished:
            return
        trainer.save_checkpoint(trainer)
        self._uninstall(trainer)
        logger.info("stopped by %s at iteration %d", signal.Signals(received).name, trainer.state.iteration)
        if received == signal.SIGINT:
            raise KeyboardInterrupt
        raise TrainingPaused(
            f"iteration {trainer.state.iteration}",
            f"asked to stop by {signal.Signals(received).name}, a checkpoint was written",
            "continue with --resume",
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.numel() == 1)


def _terms(output: Any) -> str:
    if not isinstance(output, dict):
        return ""
    return ", ".join(f"{name.removesuffix('_loss')} {float(v):.4f}" for name, v in output.items() if _is_number(v))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
