from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from fleet_work import work

from medkd.errors import ConfigError
from medkd.wsi.fleet import Watch, run_units
from medkd.wsi.fleet_clusters import available_cores, local_cluster, require_cluster


class Notes(Watch):
    """Writes down what happened."""

    def __init__(self) -> None:
        self.begun, self.steps, self.deaths, self.ends = [], [], [], []

    def started(self, index):
        self.begun.append(index)

    def progressed(self, index, done, total):
        self.steps.append((index, done, total))

    def died(self, index, deaths):
        self.deaths.append((index, deaths))

    def ended(self, ending):
        self.ends.append(ending.index)


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster of two workers that runs already."""
    with local_cluster(2, [{}, {}], None) as client:
        yield client.scheduler.address


def results(endings):
    return [ending.result for ending in endings]


def test_one_process_does_all_units_and_shows_their_progress():
    notes = Notes()
    endings = run_units(work, ["a", "raises:b", "c"], workers=0, watch=notes)
    assert results(endings) == ["A", None, "C"]
    assert str(endings[1].error) == "bad data in b"
    assert notes.begun == notes.ends == [0, 1, 2]
    assert notes.steps == [(index, step, 3) for index in (0, 2) for step in (1, 2, 3)]


def test_a_single_unit_needs_no_other_process():
    (ending,) = run_units(work, ["environment:PYTEST_CURRENT_TEST"])
    assert "test_a_single_unit" in ending.result["PYTEST_CURRENT_TEST"]


def test_no_units_is_no_work():
    assert run_units(work, []) == []


def test_a_stop_drops_the_unit_at_work_and_begins_no_other():
    stop = threading.Event()

    class StopsAtTen(Watch):
        def progressed(self, index, done, total):
            if done == 10:
                stop.set()

    endings = run_units(work, ["a", "waits", "b"], workers=0, watch=StopsAtTen(), stop=stop)
    assert results(endings) == ["A"]


def test_a_cluster_must_run_the_same_medkd(cluster, monkeypatch):
    require_cluster(cluster)
    monkeypatch.setattr("medkd.wsi.fleet_clusters.__version__", "99")
    with pytest.raises(ConfigError, match=r"has medkd .*, this is medkd 99"):
        require_cluster(cluster)


def test_workers_that_die_cost_their_own_unit_only(cluster, tmp_path):
    """Two workers; one unit kills always, one kills once, one has bad data."""
    notes = Notes()
    units = ["a", "kills", "b", "raises:c", f"kills-once:{tmp_path / 'marker'}", "d", "e"]
    endings = run_units(work, units, cluster=cluster, watch=notes)
    assert [ending.index for ending in endings] == list(range(7))
    assert results(endings) == ["A", None, "B", None, units[4].upper(), "D", "E"]
    killer, bad, unlucky = endings[1], endings[3], endings[4]
    assert killer.is_quarantined
    assert killer.deaths == 3
    assert not bad.is_quarantined
    assert isinstance(bad.error, ValueError)
    assert bad.deaths == 0
    assert unlucky.deaths == 1
    assert sorted(notes.deaths) == [(1, 1), (1, 2), (1, 3), (4, 1)]
    assert notes.begun.count(3) == 1, "bad data is never tried again"


def test_a_stop_leaves_a_cluster_at_once_and_usable(cluster):
    stop = threading.Event()

    class StopsWhenItMoves(Notes):
        def progressed(self, index, done, total):
            super().progressed(index, done, total)
            stop.set()

    notes = StopsWhenItMoves()
    start = time.monotonic()
    assert run_units(work, ["waits"] * 3, cluster=cluster, stop=stop, watch=notes) == []
    assert time.monotonic() - start < 20
    assert 0 in notes.begun
    assert 2 not in notes.begun
    assert notes.steps
    assert notes.steps[0][2] == 600


def test_local_workers_share_the_cores_and_are_reached_from_this_machine_only():
    units = ["environment:OMP_NUM_THREADS:COLOR"] * 2
    listening: set[str] = set()

    class Ports(Watch):
        def started(self, index):
            processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
            connections = [connection for process in processes for connection in process.net_connections("tcp")]
            listening.update(each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN)

    endings = run_units(work, units, environments=[{"COLOR": "red"}, {"COLOR": "blue"}], watch=Ports())
    threads = str(max(1, available_cores() // 2))
    found = results(endings)
    assert sorted(each["COLOR"] for each in found) == ["blue", "red"], "each worker has an environment of its own"
    assert {each["OMP_NUM_THREADS"] for each in found} == {threads}
    assert listening == {"127.0.0.1"}
    assert not [child for child in psutil.Process().children() if "Dask Worker" in " ".join(child.cmdline())]


@pytest.mark.slow
def test_a_unit_beyond_the_memory_limit_is_given_up_and_the_reason_known():
    endings = run_units(work, ["hogs", "a"], workers=1, memory_limit=300_000_000, deaths_allowed=1)
    assert endings[0].is_quarantined
    assert endings[0].out_of_memory
    assert endings[1].result == "A"


@pytest.mark.parametrize("address", ["localhost", "http://localhost:8786", "here:1"])
def test_what_is_no_address_of_a_scheduler_is_refused(address):
    with pytest.raises(ConfigError, match="no address of a scheduler"):
        run_units(work, ["a"], cluster=address)


def test_a_scheduler_that_does_not_answer_is_refused(monkeypatch):
    monkeypatch.setattr("medkd.wsi.fleet_clusters._ANSWER_SECONDS", 0.5)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match="no scheduler answers"):
            run_units(work, ["a"], cluster=address)


SERVICE = """
import sys
sys.path.insert(0, sys.argv[1])
from fleet_work import work
from medkd.wsi.fleet import Watch, run_units
class Says(Watch):
    def progressed(self, index, done, total):
        print(index, done, flush=True)
if __name__ == "__main__":
    run_units(work, ["waits"] * 4, workers=2, watch=Says())
"""


def test_workers_end_when_the_service_is_killed(tmp_path):
    script = tmp_path / "service.py"
    script.write_text(SERVICE)
    service = subprocess.Popen(
        [sys.executable, str(script), str(Path(__file__).parent)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert service.stdout.readline(), service.stderr.read()
    workers = psutil.Process(service.pid).children(recursive=True)
    assert len(workers) >= 2
    service.kill()
    service.communicate()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive


@pytest.mark.slow
def test_many_deaths_in_a_row_leave_the_workers_able_to_go_on():
    """Workers restart again and again, some of them long after their first death."""
    endings = run_units(work, ["kills"] * 8 + ["a"], workers=2)
    assert [ending.deaths for ending in endings] == [3] * 8 + [0]
    assert endings[-1].result == "A"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs the right to leave the network")
def test_local_workers_need_no_network():
    """In a network namespace with nothing but the loopback interface."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from fleet_work import work\nfrom medkd.wsi.fleet import run_units\n"
        "if __name__ == '__main__':\n    print([e.result for e in run_units(work, ['a', 'b'], workers=1)])\n"
    )
    command = f"ip link set lo up && exec {sys.executable} -W error -c {code!r}".replace("\\n", "\n")
    done = subprocess.run(["unshare", "-rn", "sh", "-c", command], capture_output=True, text=True, check=False)
    if "unshare" in done.stderr or "ip: not found" in done.stderr:
        pytest.skip("no network namespace to be had")
    assert done.stdout.strip() == "['A', 'B']", done.stderr
