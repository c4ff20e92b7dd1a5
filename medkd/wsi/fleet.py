"""Many independent units of work on many processes or machines, of which a bad one never stops the others.

A unit is whatever the caller says; here it is only handed to a function. Several units run on a dask.distributed
cluster: by default one of local processes that only this machine can reach, or one that runs already. Each worker
process has one unit at a time, so when a worker dies it is known which unit it died of; that unit gets
another worker, after the other units, until it has cost ``deaths_allowed`` workers.

What a function raises is handed back and never tried again: bad data stays bad.

**Many machines.** Any dask cluster whose workers see the same files under the same paths will do. With dask-jobqueue::

    from dask_jobqueue import SLURMCluster

    cluster = SLURMCluster(cores=4, processes=1, memory="16GB", walltime="08:00:00",
                           worker_extra_args=["--lifetime", "7h", "--lifetime-stagger", "10m"])
    cluster.scale(jobs=20)                # one worker process per job, one slide at a time in each
    print(cluster.scheduler_address)      # medkd slide predict MODEL --slides all.csv --out DIR --cluster <this>

Without a scheduler, as a Slurm job array: every task takes its share of the same list and all write into one folder.
A task that is stopped (``--signal``), and is queued again, goes on where it was::

    #SBATCH --array=1-20
    #SBATCH --cpus-per-task=4
    #SBATCH --signal=TERM@60
    #SBATCH --requeue
    srun medkd slide predict MODEL --slides all.csv --out DIR --shard "$SLURM_ARRAY_TASK_ID/20" --resume
    [ $? -eq 75 ] && scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from distributed import Client, Future, KilledWorker, get_worker

from medkd.errors import ConfigError
from medkd.wsi.fleet_clusters import available_cores, local_cluster, running_cluster

U = TypeVar("U")
R = TypeVar("R")
Report = Callable[[int, int], None]

DEATHS_ALLOWED = 3
_POLL_SECONDS = 0.2
_REPORT_SECONDS = 0.5
_PATIENCE_SECONDS = 120.0  # for the first worker of a local cluster, and for one after all have died


class Stopped(BaseException):
    """Raised by ``report`` in the middle of a unit when the run was asked to stop; not an error of the unit."""


@dataclass(frozen=True)
class Ending(Generic[R]):
    """How a unit ended.

    Attributes:
        index: of the unit.
        result: what the function returned; None if it did not.
        error: what the function raised, if it did.
        deaths: how many workers died while they had the unit.
        out_of_memory: whether the last of them died because it needed more than its memory limit.
        seconds: from the start of the last attempt to its end.
    """

    index: int
    result: R | None
    error: BaseException | None
    deaths: int
    out_of_memory: bool
    seconds: float

    @property
    def is_quarantined(self) -> bool:
        """Whether the unit was given up because its workers died."""
        return self.result is None and self.error is None


class Watch:
    """What happens while units run; the base class looks away. All methods are called from one thread at a time."""

    def started(self, index: int) -> None:
        """A worker took a unit."""

    def progressed(self, index: int, done: int, total: int) -> None:
        """A unit has done so many of its steps."""

    def died(self, index: int, deaths: int) -> None:
        """The worker that had the unit is gone, the unit's ``deaths``-th."""

    def ended(self, ending: Ending[Any]) -> None:
        """A unit has ended."""

    def waiting_for_workers(self) -> None:
        """The cluster has no worker yet, or none any more."""


def run_units(
    function: Callable[[U, Report], R],
    units: Sequence[U],
    *,
    workers: int | None = None,
    cluster: str | None = None,
    environments: Sequence[Mapping[str, str]] = (),
    memory_limit: int | None = None,
    deaths_allowed: int = DEATHS_ALLOWED,
    watch: Watch | None = None,
    stop: threading.Event | None = None,
) -> list[Ending[R]]:
    """Call a function on every unit and say how each ended.

    Args:
        function: called as ``function(unit, report)``; ``report(done, total)`` shows progress. It may be called
            more than once on a unit, so it must be idempotent. Function, units and results are pickled.
        units: the work, in the order in which it is begun.
        workers: local processes; by default one per core or unit, whichever is fewer. 0, or a single unit without
            ``cluster``: this process, one unit after another, without retries or a memory limit.
        cluster: address of a running dask scheduler instead of local processes, as ``tcp://host:8786``.
        environments: variables of each local worker process; gives their number too.
        memory_limit: bytes a local worker may use before it is killed; by default an equal share of the memory.
        deaths_allowed: a unit is given up when so many workers died of it.
        watch: told what happens.
        stop: once set, no unit is begun and those underway are dropped.

    Returns:
        The endings, by index; units that were dropped or not begun have none.

    Raises:
        ConfigError: The cluster cannot be reached, or lost its scheduler or all its local workers for good.
    """
    watch, stop = watch or Watch(), stop or threading.Event()
    if not units:
        return []
    if cluster is None and not environments and (workers == 0 or len(units) == 1):
        return _run_here(function, units, watch, stop)
    if cluster is not None:
        with running_cluster(cluster) as client:
            return _Run(function, units, client, deaths_allowed, watch, stop, cluster).endings()
    count = min(len(environments) or workers or available_cores(), len(units))
    with local_cluster(count, [*environments[:count]] or [{}] * count, memory_limit) as client:
        return _Run(function, units, client, deaths_allowed, watch, stop, None).endings()


def _run_here(
    function: Callable[[U, Report], R], units: Sequence[U], watch: Watch, stop: threading.Event
) -> list[Ending[R]]:
    endings: list[Ending[R]] = []
    for index, unit in enumerate(units):

        def report(done: int, total: int, index: int = index) -> None:
            watch.progressed(index, done, total)
            if stop.is_set() and done < total:  # with all steps done, what is left is short: it is finished
                raise Stopped

        if stop.is_set():
            break
        watch.started(index)
        start = time.monotonic()
        result, failure = None, None
        try:
            result = function(unit, report)
        except Stopped:
            break
        except Exception as error:
            failure = error
        endings.append(Ending(index, result, failure, 0, False, time.monotonic() - start))
        watch.ended(endings[-1])
    return endings


@dataclass(frozen=True)
class _Attempt:
    index: int
    worker: str
    started: float


class _Run(Generic[U, R]):
    """One pass over the units on a cluster: who works on what, and what becomes of it."""

    def __init__(
        self,
        function: Callable[[U, Report], R],
        units: Sequence[U],
        client: Client,
        deaths_allowed: int,
        watch: Watch,
        stop: threading.Event,
        remote: str | None,
    ) -> None:
        self.function, self.units, self.client = function, units, client
        self.deaths_allowed, self.watch, self.stop, self.remote = deaths_allowed, watch, stop, remote
        self.waiting = deque(range(len(units)))
        self.running: dict[Future[R], _Attempt] = {}
        self.deaths = [0] * len(units)
        self.done: dict[int, Ending[R]] = {}
        self.topic = f"medkd-{uuid.uuid4().hex}"
        self.news: deque[tuple[int, int, int]] = deque()
        self.wake = threading.Event()
        self.over_memory: set[str] = set()
        self.without_workers_since = time.monotonic()

    def endings(self) -> list[Ending[R]]:
        self.client.subscribe_topic(self.topic, lambda event: self.news.append(tuple(event[1])))
        self.client.subscribe_topic("worker-restart-memory", lambda event: self.over_memory.add(event[1]["worker"]))
        try:
            while (self.waiting or self.running) and not self.stop.is_set():
                alive = self._workers()
                self._collect(alive)
                self._hand_out(alive)
                self._pass_on_news()
                self._wait()
        finally:
            for future in self.running:
                with suppress(Exception):
                    future.cancel()
        return [self.done[index] for index in sorted(self.done)]

    def _workers(self) -> set[str]:
        """Addresses of the workers that are there."""
        try:
            alive = set(self.client.nthreads())
        except (OSError, TimeoutError, RuntimeError) as error:  # CommClosedError is an OSError
            raise ConfigError(
                self.remote or "local cluster", f"the scheduler is gone ({type(error).__name__})", "--resume goes on"
            ) from error
        if alive:
            self.without_workers_since = time.monotonic()
        elif self.without_workers_since:
            self._no_workers(time.monotonic() - self.without_workers_since)
        return alive

    def _no_workers(self, seconds: float) -> None:
        if self.remote is None and seconds > _PATIENCE_SECONDS:
            problem = f"no worker process could be started for {seconds:.0f} s"
            raise ConfigError("local cluster", problem, "give workers more memory, or use fewer")
        if seconds > 1:
            self.watch.waiting_for_workers()

    def _collect(self, alive: set[str]) -> None:
        """Take in what has ended, one way or another."""
        for future, attempt in list(self.running.items()):
            seconds = time.monotonic() - attempt.started
            result, error = None, None
            if future.status == "finished":
                try:
                    result = future.result(timeout=10)
                except TimeoutError:  # its worker died with the result; the next round finds out
                    if attempt.worker in alive:
                        continue
                    self._bury(future, attempt)
                    continue
                except Exception as failure:  # a result that cannot be unpickled, say
                    error = failure
            elif future.status == "error":
                error = future.exception(timeout=10)
                if isinstance(error, KilledWorker):  # a scheduler that counts deaths itself has seen enough
                    self.deaths[attempt.index] = max(self.deaths[attempt.index], self.deaths_allowed - 1)
                    self._bury(future, attempt)
                    continue
            elif attempt.worker not in alive or future.status in ("lost", "cancelled"):
                self._bury(future, attempt)
                continue
            else:
                continue
            del self.running[future]
            self._end(Ending(attempt.index, result, error, self.deaths[attempt.index], False, seconds))

    def _bury(self, future: Future[R], attempt: _Attempt) -> None:
        """A worker died: its unit waits for another one, behind the others, or is given up."""
        del self.running[future]
        with suppress(Exception):
            future.cancel()
        index = attempt.index
        self.deaths[index] += 1
        self._pass_on_news()
        self.watch.died(index, self.deaths[index])
        if self.deaths[index] < self.deaths_allowed:
            self.waiting.append(index)
            return
        seconds = time.monotonic() - attempt.started
        self._end(Ending(index, None, None, self.deaths[index], attempt.worker in self.over_memory, seconds))

    def _end(self, ending: Ending[R]) -> None:
        self.done[ending.index] = ending
        self._pass_on_news()
        self.watch.ended(ending)

    def _hand_out(self, alive: set[str]) -> None:
        """Give a unit to every worker that has none."""
        busy = {attempt.worker for attempt in self.running.values()}
        for worker in sorted(alive - busy):
            if not self.waiting:
                return
            index = self.waiting.popleft()
            # Pinned, so that the scheduler neither queues two units on one worker nor moves them about by itself.
            future = self.client.submit(
                _call,
                self.function,
                self.units[index],
                index,
                self.topic,
                key=f"medkd-{index}-{uuid.uuid4().hex}",
                pure=False,
                workers=[worker],
                allow_other_workers=False,
                retries=0,
            )
            future.add_done_callback(lambda _: self.wake.set())
            self.running[future] = _Attempt(index, worker, time.monotonic())
            self.watch.started(index)

    def _pass_on_news(self) -> None:
        while self.news:
            index, done, total = self.news.popleft()
            if index not in self.done:
                self.watch.progressed(index, done, total)

    def _wait(self) -> None:
        self.wake.wait(_POLL_SECONDS)
        self.wake.clear()


def _call(function: Callable[[U, Report], R], unit: U, index: int, topic: str) -> R:
    """What runs on a worker."""
    worker = get_worker()
    last = 0.0

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _REPORT_SECONDS or done >= total:
            last = now
            worker.log_event(topic, [index, int(done), int(total)])

    return function(unit, report)
