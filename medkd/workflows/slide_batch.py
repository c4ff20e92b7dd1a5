"""A batch of slides: run, watched, stopped when asked, and told of in two tables."""

from __future__ import annotations

import csv
import errno
import logging
import secrets
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from medkd.data.atomic import atomic_write
from medkd.errors import ConfigError, MedkdError
from medkd.workflows.failures import Failure, write_failures
from medkd.workflows.slide_list import ListedSlide
from medkd.workflows.slide_units import Job
from medkd.wsi.fleet import Ending, Report, Watch, run_units
from medkd.wsi.slide_state import (
    STATE_FOLDER,
    SlideRecord,
    alone,
    discard_unfinished,
    forget,
    hold,
    read_record,
    write_record,
)

logger = logging.getLogger(__name__)

SUMMARY_FILE = "summary.csv"
PAUSED, INTERRUPTED = 75, 130
_COLUMNS = ("slide", "status", "tiles", "failed_tiles", "mpp", "seconds", "worker_deaths", "reason", "file")


class SlideUnit(Protocol):
    """What a batch must know of a unit."""

    @property
    def job(self) -> Job:
        """The slide and where its outputs go."""


Unit = TypeVar("Unit", bound=SlideUnit)


class SlideView(Protocol):
    """Something that shows a batch while it runs."""

    def started(self, name: str) -> None:
        """Work on a slide began."""

    def progressed(self, name: str, done: int, total: int) -> None:
        """So many of its tiles are done."""

    def died(self, name: str, deaths: int) -> None:
        """Its worker died."""

    def ended(self, record: SlideRecord) -> None:
        """It has ended."""


@dataclass(frozen=True)
class SlideBatch:
    """What became of a batch.

    Attributes:
        records: of the slides that ended, in the order of the list.
        failures: the rows of failures.csv that are this process's.
        total: how many slides it had to work on.
        paused: the signal that stopped it, if one did.
        blocked: why nothing more can be written to the output folder; empty where it can.
        out: the output folder.
    """

    records: list[SlideRecord]
    failures: list[Failure]
    total: int
    out: Path
    paused: int | None = None
    blocked: str = ""

    @property
    def written(self) -> list[Path]:
        """The output files of the slides that ended well."""
        return [self.out / file for record in self.records for file in record.files]

    @property
    def exit_code(self) -> int:
        """0 when all slides ended well, 1 when one did not, 75 or 130 when the batch was stopped before its end."""
        if self.paused is not None and len(self.records) < self.total:
            return INTERRUPTED if self.paused == signal.SIGINT else PAUSED
        return 1 if self.failures or self.blocked else 0


def run_batch(
    function: Callable[[Unit, Report], SlideRecord],
    units: Sequence[Unit],
    out: Path,
    *,
    listed: Sequence[ListedSlide],
    shard: tuple[int, int] | None = None,
    workers: int | None = None,
    cluster: str | None = None,
    environments: Sequence[Mapping[str, str]] = (),
    memory_limit: int | None = None,
    view: SlideView | None = None,
) -> SlideBatch:
    """Work on slides in a prepared folder, and write summary.csv and failures.csv.

    Args:
        function: works on one unit and never raises for what a slide is to blame for.
        units: one per slide of this process.
        out: the folder.
        listed: the slides of all shards.
        shard: which of them is this process's.
        workers: see :func:`medkd.wsi.fleet.run_units`, also for the next three.
        cluster: address of a running cluster.
        environments: of the workers.
        memory_limit: of each worker, bytes.
        view: shows progress.

    Raises:
        ConfigError: the cluster cannot be used, or another process is at work in the folder.
    """
    stop = threading.Event()
    deidentify = any(unit.job.deidentify for unit in units)
    watch = _BatchWatch(units, out, stop, view)
    with hold(out, shard), _stopped_by_signals(stop) as received:
        _forget_other_setups(out, units)
        try:
            run_units(
                function, units, workers=workers, cluster=cluster, environments=environments,
                memory_limit=memory_limit, watch=watch, stop=stop,
            )  # fmt: skip
        except ConfigError:  # the cluster is gone; what was done before is told nevertheless
            if watch.records:
                _write_tables(out, listed, list(watch.records.values()), deidentify=deidentify)
            raise
        finally:
            if cluster is None:  # workers elsewhere may still be at it
                for unit in units:
                    discard_unfinished(out, unit.job.slide.name)
        records = [watch.records[unit.job.slide.name] for unit in units if unit.job.slide.name in watch.records]
        failures = _write_tables(out, listed, records, deidentify=deidentify)
    return SlideBatch(
        records,
        failures,
        total=len(units),
        out=out,
        paused=received[0] if received else None,
        blocked=watch.blocked,
    )


def _forget_other_setups(out: Path, units: Sequence[SlideUnit]) -> None:
    """Remove outputs of another model or other parameters at once, so that a stopped batch leaves no mixture."""
    for unit in units:
        record = read_record(out, unit.job.slide.name)
        if record is not None and record.setup != unit.job.setup:
            forget(out, record.name)


class _BatchWatch(Watch):
    """Turns what the fleet says into records, log lines and the picture on the terminal."""

    def __init__(self, units: Sequence[SlideUnit], out: Path, stop: threading.Event, view: SlideView | None) -> None:
        self.jobs = [unit.job for unit in units]
        self.out, self.stop, self.view = out, stop, view
        self.records: dict[str, SlideRecord] = {}
        self.blocked = ""
        self.waits = False

    def started(self, index: int) -> None:
        self.waits = False
        if self.view is not None:
            self.view.started(self.jobs[index].slide.name)

    def progressed(self, index: int, done: int, total: int) -> None:
        if self.view is not None:
            self.view.progressed(self.jobs[index].slide.name, done, total)

    def died(self, index: int, deaths: int) -> None:
        name = self.jobs[index].slide.name
        logger.warning("%s: its worker process died (%d)", _text(name), deaths)
        if self.view is not None:
            self.view.died(name, deaths)

    def waiting_for_workers(self) -> None:
        if not self.waits:
            logger.info("waiting for workers")
        self.waits = True

    def ended(self, ending: Ending[SlideRecord]) -> None:
        job = self.jobs[ending.index]
        record = ending.result if ending.result is not None else self._record_of_a_loss(job, ending)
        record = replace(record, deaths=ending.deaths)
        self.records[record.name] = record
        self._say(record)
        if record.disk_is_full and not self.blocked:
            self.blocked = _why_not_writable(self.out)
            if self.blocked:
                self.stop.set()
        if self.view is not None:
            self.view.ended(record)

    def _record_of_a_loss(self, job: Job, ending: Ending[SlideRecord]) -> SlideRecord:
        """The record of a slide whose worker could not write one."""
        if ending.is_quarantined:
            why = ", the last for want of memory: give workers more, or use a smaller --batch-size"
            reason = f"{ending.deaths} worker processes died of it" + (why if ending.out_of_memory else "")
        else:
            error = ending.error
            shown = str(error) if isinstance(error, MedkdError) and not job.deidentify else type(error).__name__
            reason = f"a fault while working on it: {shown}"
        record = SlideRecord(
            job.slide.name, "failed", setup=job.setup, reason=reason, seconds=round(ending.seconds, 3),
            deaths=ending.deaths,
        )  # fmt: skip
        with suppress(OSError):
            forget(self.out, record.name)
            write_record(self.out, record)
        return record

    def _say(self, record: SlideRecord) -> None:
        for message in record.notes:
            logger.warning("%s", _text(message))
        if record.details:
            logger.debug("%s", _text(record.details))
        count = f"{len(self.records)}/{len(self.jobs)} {_text(record.name)}"
        if not record.is_success:
            logger.error("%s: %s: %s", _text(record.name), record.status, _text(record.reason))
        elif record.reused:
            logger.info("%s: %s before", count, record.status)
        else:
            bad = f", {record.failed_tiles} could not be used" if record.failed_tiles else ""
            logger.info("%s: %s, %s tiles%s, %.1f s", count, record.status, record.tiles, bad, record.seconds)


def _write_tables(
    out: Path, listed: Sequence[ListedSlide], records: Sequence[SlideRecord], *, deidentify: bool
) -> list[Failure]:
    """Write summary.csv and failures.csv about all shards; returns the failures of this one."""
    own = {record.name: record for record in records}
    files = {slide.name: "" if deidentify else str(slide.path) for slide in listed}
    try:
        with alone(out):
            found = [own.get(slide.name) or read_record(out, slide.name) for slide in listed]
            rows = [record for record in found if record is not None]
            with atomic_write(out / SUMMARY_FILE) as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(_COLUMNS)
                for row in rows:
                    writer.writerow(
                        [
                            _text(row.name), row.status, _cell(row.tiles), _cell(row.failed_tiles), _cell(row.mpp),
                            f"{row.seconds:.1f}", row.deaths, _text(row.reason), _text(files[row.name]),
                        ]
                    )  # fmt: skip
            write_failures(out, [_failure(row, files) for row in rows if not row.is_success])
    except OSError as error:
        logger.error("%s: the summary cannot be written (%s)", out, error.strerror)
    return [_failure(row, files) for row in records if not row.is_success]


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _failure(record: SlideRecord, files: Mapping[str, str]) -> Failure:
    return Failure(_text(record.name), _text(files[record.name]), _text(f"{record.status}: {record.reason}"))


def _text(text: str) -> str:
    """Text that can be written as UTF-8: file names need not be that."""
    return text.encode(errors="backslashreplace").decode()


def _why_not_writable(out: Path) -> str:
    """Why nothing can be written to a folder; empty where it can, so that one slide alone was too large."""
    probe = out / STATE_FOLDER / f".probe-{secrets.token_hex(4)}"
    try:
        probe.write_bytes(bytes(1 << 20))
    except OSError as error:
        return error.strerror or errno.errorcode.get(error.errno or 0, "unknown")
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    return ""


@contextmanager
def _stopped_by_signals(stop: threading.Event) -> Iterator[list[int]]:
    """Turn the first SIGTERM, SIGUSR1 or SIGINT into a stop; the second ends the process the hard way.

    Yields:
        The signals that came.
    """
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
