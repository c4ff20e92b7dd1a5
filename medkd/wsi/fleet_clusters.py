"""Where a fleet works: on processes of this machine, or on somebody's dask cluster."""

from __future__ import annotations

import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import dask
from distributed import Client, Nanny, Scheduler, SpecCluster, WorkerPlugin
from distributed.system import MEMORY_LIMIT

from medkd import __version__
from medkd.errors import ConfigError

_SILENT = logging.CRITICAL + 1
_ANSWER_SECONDS = 10


def available_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def running_cluster(address: str) -> Iterator[Client]:
    """A client of somebody else's cluster.

    Raises:
        ConfigError: Nobody answers there.
    """
    if "://" not in address or address.split("://")[0] not in ("tcp", "tls", "ws", "wss", "ucx"):
        raise ConfigError("--cluster", f"{address!r} is no address of a scheduler", "write it as tcp://host:8786")
    with _quiet_logs():
        try:
            client = Client(address, timeout=_ANSWER_SECONDS, set_as_default=False)
        except (OSError, TimeoutError, ValueError) as error:
            reason = f"no scheduler answers at {address} ({type(error).__name__})"
            raise ConfigError("--cluster", reason, "start `dask scheduler` there, or leave the option out") from None
        try:
            yield client
        finally:
            with suppress(Exception):
                client.close(timeout=10)


def require_cluster(address: str) -> None:
    """Refuse a cluster before anything is begun.

    Raises:
        ConfigError: Nobody answers there, or its workers lack medkd or have another version of it.
    """
    with running_cluster(address) as client:
        for worker, version in client.run(_own_version, on_error="return").items():
            if version != __version__:
                found = f"medkd {version}" if isinstance(version, str) else "no medkd"
                problem = f"the worker {worker} has {found}, this is medkd {__version__}"
                raise ConfigError("--cluster", problem, "install the same version there")


def _own_version() -> str:
    return __version__


@contextmanager
def local_cluster(count: int, environments: Sequence[Mapping[str, str]], memory_limit: int | None) -> Iterator[Client]:
    """Worker processes of this machine that only it can reach."""
    threads = max(1, available_cores() // count)
    shared = {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL", "OPENBLAS")}
    # dask serves HTTP in any case, by default to everybody: so on this machine only, and with no page.
    address = {"host": "127.0.0.1", "protocol": "tcp://", "dashboard": False, "dashboard_address": "127.0.0.1:0"}
    options = {
        **address,
        "nthreads": 1,
        "memory_limit": memory_limit or int(MEMORY_LIMIT) // count,
        "silence_logs": _SILENT,
        "plugins": (_QuietWorker(),),
    }
    specification = {
        index: {"cls": Nanny, "options": {**options, "env": {**shared, **environment}}}
        for index, environment in enumerate(environments)
    }
    scheduler = {"cls": Scheduler, "options": {**address, "port": 0}}
    with (
        _quiet_logs(),
        dask.config.set(_SETTINGS),
        SpecCluster(workers=specification, scheduler=scheduler, silence_logs=_SILENT) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


# Units keep their data on disk themselves: dask has nothing to spill, and pausing a worker at 80 % would stop a run.
# A worker that happens to be restarting 15 s after an earlier death counts as lost to dask, which then closes its
# nanny for good: so no worker is ever lost, only restarted.
_SETTINGS: dict[str, Any] = {
    "distributed.scheduler.http.routes": [],
    "distributed.worker.http.routes": [],
    "distributed.deploy.lost-worker-timeout": "1000 days",
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": 0.95,
    "distributed.worker.profile.enabled": False,
    "distributed.scheduler.work-stealing": False,
    "distributed.admin.system-monitor.gil.enabled": False,
}


class _QuietWorker(WorkerPlugin):
    """A worker process that speaks through its results only.

    Ctrl-C reaches every process of a terminal, but only the first decides what it means; and what libraries have to
    say when a worker imports them would be said once by every worker, into the middle of the progress.
    """

    name = "medkd-quiet-worker"

    def setup(self, worker: Any) -> None:
        """Called by dask when a worker process starts."""
        logging.getLogger().addHandler(logging.NullHandler())
        warnings.simplefilter("ignore")
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def teardown(self, worker: Any) -> None:
        """Called by dask when a worker process ends."""


@contextmanager
def _quiet_logs() -> Iterator[None]:
    """What dask says about dying workers is said better by the watch."""
    library = logging.getLogger("distributed")
    before = library.level
    library.setLevel(_SILENT)
    try:
        yield
    finally:
        library.setLevel(before)
