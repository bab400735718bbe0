"""Threads and Dask workers do the same: results in order, errors raised, progress told."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from distributed.security import Security
from hypothesis import given, settings
from hypothesis import strategies as st

import clusterlob_gpu
from clusterlob_gpu.errors import ClusterlobError, InputError, LakeError, TasksFailed, WorkerLostError
from clusterlob_gpu.places import ConnectPlace, LocalPlace
from clusterlob_gpu.workers import Place, Workers, _Task, joined, open_workers

PACKAGE = Path(clusterlob_gpu.__file__).parent

Told = list[tuple[str, int, int]]


def slow_square(x: int) -> int:
    """The first items take longest: results arrive in another order than they are asked for."""
    time.sleep(0.02 * (3 - x % 4))
    return x * x


def die_at_some(x: int) -> int:
    if x in (7, 23, 30):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.02)
    return x


def fail_at_five(x: int) -> int:
    if x == 5:
        raise LakeError(f"item {x} is broken")
    return x


def no_memory_from_two(x: int) -> int:
    if x >= 2:
        raise MemoryError("8 GiB refused")
    return x


def no_space(x: int) -> int:
    time.sleep(0.05)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "part")


def process_number(_: int) -> int:
    return os.getpid()


@pytest.fixture(scope="module", params=["threads", "local"])
def opened(request: pytest.FixtureRequest) -> Iterator[tuple[Workers, Told]]:
    told: Told = []
    with open_workers(Place(kind=request.param), lambda *told_now: told.append(told_now)) as workers:
        yield workers, told


def test_map__results_are_in_order(opened: tuple[Workers, Told]) -> None:
    workers, told = opened
    told.clear()
    assert workers.map("square them", slow_square, range(9)) == [x * x for x in range(9)]
    assert told[0] == ("square them", 0, 9)
    assert told[-1] == ("square them", 9, 9)
    counts = [done for _, done, _ in told]
    assert counts == sorted(counts)
    assert {(stage, total) for stage, _, total in told} == {("square them", 9)}


def test_map__same_stage_twice_is_computed_twice(opened: tuple[Workers, Told]) -> None:
    workers, _ = opened
    assert workers.map("fit", slow_square, [2, 3]) == [4, 9]
    assert workers.map("fit", slow_square, [4]) == [16]


def test_map__nothing_to_do(opened: tuple[Workers, Told]) -> None:
    workers, told = opened
    told.clear()
    assert workers.map("idle", slow_square, []) == []
    assert told == [("idle", 0, 0)]


def test_map__an_items_own_fault_stops_no_other(opened: tuple[Workers, Told]) -> None:
    workers, told = opened
    told.clear()
    with pytest.raises(TasksFailed, match=r"^item 5 is broken$") as caught:
        workers.map("fail", fail_at_five, range(40))
    assert told[-1] == ("fail", 40, 40)
    assert (caught.value.stage, list(caught.value.failed), caught.value.exit_code) == ("fail", [5], 2)
    assert isinstance(caught.value.failed[5], LakeError)
    assert workers.map("after", fail_at_five, [1, 2]) == [1, 2]


def test_map__no_memory_is_an_items_own_fault(opened: tuple[Workers, Told]) -> None:
    workers, _ = opened
    with pytest.raises(TasksFailed) as caught:
        workers.map("large days", no_memory_from_two, range(4))
    assert str(caught.value) == (
        "large days: a task found no memory (8 GiB refused); give its worker more memory or fewer threads"
        "; and 1 more"
    )
    assert list(caught.value.failed) == [2, 3]
    assert caught.value.exit_code == 1


def test_map__many_items_share_a_task_and_none_its_fault(opened: tuple[Workers, Told]) -> None:
    """500 items of two workers are a few dozen tasks, each of which is told of once."""
    workers, told = opened
    told.clear()
    with pytest.raises(TasksFailed) as caught:
        workers.map("fail", fail_at_five, range(500))
    assert list(caught.value.failed) == [5]
    if "local" in workers.name:
        assert len(told) < 50
    assert told[-1] == ("fail", 500, 500)


@settings(max_examples=100)
@given(n=st.integers(0, 3000), at_once=st.integers(1, 300))
def test_joined__all_once_many_at_first_and_one_by_one_at_last(n: int, at_once: int) -> None:
    parts = joined(range(n), at_once)
    assert sorted(item for part in parts for item in part) == list(range(n))
    sizes = [len(part) for part in parts]
    assert sizes == sorted(sizes, reverse=True)
    left = n
    for size in sizes:
        assert 1 <= size <= max(1, min(32, left / (2 * at_once)))
        left -= size
    assert sizes[-2 * at_once :] == [1] * min(n, 2 * at_once)


def test_joined__neighbours_are_apart() -> None:
    """The days of the largest symbol, which come first, are not one worker's."""
    for part in joined(range(20_000), 64):
        assert sum(item < 365 for item in part) <= 1


def test_task__an_error_holds_nothing_of_its_item() -> None:
    """While the next items of a joined task are computed."""
    held: list[weakref.ref[np.ndarray]] = []

    def broken(_: int) -> None:
        day = np.zeros(1000)
        held.append(weakref.ref(day))
        try:
            raise ValueError
        except ValueError as error:
            raise LakeError("broken") from error

    given = _Task(broken, {})._given(1)
    assert held[0]() is None
    with pytest.raises(LakeError, match="broken"):
        given()


def test_map__any_other_error_is_raised_at_once(opened: tuple[Workers, Told]) -> None:
    workers, told = opened
    told.clear()
    with pytest.raises(OSError, match="No space left"):
        workers.map("full", no_space, range(200))
    assert max(done for _, done, _ in told) < 100
    assert workers.map("after", fail_at_five, [1, 2]) == [1, 2]


def test_map__where_it_runs(opened: tuple[Workers, Told]) -> None:
    workers, _ = opened
    found = set(workers.map("where", process_number, range(8)))
    if workers.name.endswith("threads") and "local" not in workers.name:
        assert found == {os.getpid()}
        assert workers.name == "2 threads"
    else:
        assert os.getpid() not in found
        assert workers.name == "2 local workers x 1 threads"


def test_threads__what_waits_is_not_begun_after_an_error() -> None:
    begun: list[int] = []
    hold = threading.Event()

    def task(x: int) -> int:
        begun.append(x)
        if x == 0:
            raise ZeroDivisionError
        hold.wait(0.2)
        return x

    with (
        open_workers(Place(kind="threads", n_workers=1), lambda *_: None) as workers,
        pytest.raises(ZeroDivisionError),
    ):
        workers.map("fail", task, range(100))
    assert len(begun) < 5


# ---- what goes wrong with workers -------------------------------------------------------------------


def wait_until(true: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def leave_process_number(folder: Path, x: int) -> int:
    """Writes down which process works on an item, so that the test can kill it meanwhile."""
    with (folder / f"{x}.pid").open("a") as file:
        file.write(f"{os.getpid()} ")
    time.sleep(0.5)
    return x * x


def die_at_three(x: int) -> int:
    if x == 3:
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.3)
    return x


def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def pid_in(file: Path) -> int:
    wait_until(lambda: file.exists() and file.read_text())
    return int(file.read_text().split()[0])


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_local__a_killed_worker_changes_no_result_and_undoes_none(tmp_path: Path) -> None:
    def kill_one() -> None:
        worker = pid_in(tmp_path / "2.pid")
        # By now the results of 0 and 1 are fetched.
        time.sleep(0.2)
        os.kill(worker, signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    with open_workers(LocalPlace(n_workers=1), lambda *_: None) as workers:
        killer.start()
        found = workers.map("kill one", partial(leave_process_number, tmp_path), range(5))
        killer.join()
    assert found == [x * x for x in range(5)]
    assert [len((tmp_path / f"{x}.pid").read_text().split()) for x in range(5)] == [1, 1, 2, 1, 1]


@pytest.mark.parametrize(("threads", "n_items"), [(1, 6), (3, 6), (1, 10)])
def test_local__a_task_that_kills_its_workers_fails_alone(threads: int, n_items: int) -> None:
    """Of ten items of one worker five share a task."""
    place = LocalPlace(n_workers=1, threads_per_worker=threads, allowed_failures=1)
    with (
        open_workers(place, lambda *_: None) as workers,
        pytest.raises(TasksFailed) as caught,
    ):
        workers.map("days", die_at_three, range(n_items))
    assert list(caught.value.failed) == [3]
    assert isinstance(caught.value.failed[3], WorkerLostError)
    assert str(caught.value) == "days: the worker of a task died 2 times; its memory limit may be too small"
    assert caught.value.exit_code == 1


def test_local__what_shares_a_task_with_killers_is_done_once_more_and_well() -> None:
    """Of 40 items of two workers up to ten share a task."""
    told: Told = []
    place = LocalPlace(n_workers=2, allowed_failures=0)
    with (
        open_workers(place, lambda *what: told.append(what)) as workers,
        pytest.raises(TasksFailed) as caught,
    ):
        workers.map("days", die_at_some, range(40))
    assert list(caught.value.failed) == [7, 23, 30]
    # Whose outcome is not known yet does not count as done.
    assert [done for _, done, _ in told].count(40) == 1


DRIVER = """
import sys
from functools import partial
from pathlib import Path
from clusterlob_gpu.places import LocalPlace
from clusterlob_gpu.workers import open_workers
from test_workers import leave_process_number_and_sleep

if __name__ == "__main__":
    with open_workers(LocalPlace(n_workers=1), lambda *_: None) as workers:
        workers.map("hold", partial(leave_process_number_and_sleep, Path(sys.argv[1])), range(3))
"""


def leave_process_number_and_sleep(folder: Path, x: int) -> int:
    (folder / f"{x}.pid").write_text(str(os.getpid()))
    time.sleep(60)
    return x


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_local__workers_end_with_the_driver(tmp_path: Path, how: signal.Signals) -> None:
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    here = os.pathsep.join([str(PACKAGE.parent), str(Path(__file__).parent)])
    driver = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": here},
        stderr=subprocess.DEVNULL,
        process_group=0,
    )
    worker = pid_in(tmp_path / "0.pid")
    driver.send_signal(how)
    driver.wait(20)
    wait_until(lambda: not is_alive(worker), 10)
    assert not (tmp_path / "1.pid").exists()


# ---- a scheduler that runs already ------------------------------------------------------------------


class Scheduler:
    """A `dask scheduler` and its workers, each a process of its own."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.options = folder, [*options]
        self.processes: list[subprocess.Popen[bytes]] = []
        file = folder / "scheduler.json"
        protocol = ["--protocol", "tls"] if options else []
        self.scheduler = self.start(
            "scheduler", "--port", "0", "--no-dashboard", "--scheduler-file", str(file), *protocol
        )
        wait_until(lambda: file.exists() and file.read_text().endswith("}"))  # not while it is written
        self.address: str = json.loads(file.read_text())["address"]

    def start(self, what: str, *arguments: str, path: str = "") -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.dask_{what}", "--host", "127.0.0.1"]
        here = (path, str(PACKAGE.parent), str(Path(__file__).parent))
        with (self.folder / f"{what}.log").open("ab") as log:
            process = subprocess.Popen(
                [*command, *arguments, *self.options],
                cwd=self.folder,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, here))},
                stderr=log,
            )
        self.processes.append(process)
        return process

    def add_worker(self, path: str = "") -> subprocess.Popen[bytes]:
        """A worker that finds modules in `path` first."""
        options = ["--nthreads", "1", "--no-dashboard", "--death-timeout", "20"]
        return self.start("worker", self.address, *options, path=path)

    def close(self) -> None:
        for process in reversed(self.processes):
            process.kill()
            process.wait()


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[Scheduler]:
    with closing(Scheduler(tmp_path)) as started:
        yield started


def test_connect__maps_on_the_workers_that_are_there(scheduler: Scheduler) -> None:
    scheduler.add_worker()
    with open_workers(ConnectPlace(address=scheduler.address), lambda *_: None) as workers:
        assert workers.name == f"workers of {scheduler.address}"
        assert workers.map("square", slow_square, range(5)) == [0, 1, 4, 9, 16]
    assert scheduler.scheduler.poll() is None, "the scheduler is not ours to stop"


def test_connect__lost_scheduler_is_one_line(scheduler: Scheduler, tmp_path: Path) -> None:
    def kill_the_scheduler() -> None:
        pid_in(tmp_path / "0.pid")
        scheduler.scheduler.kill()

    scheduler.add_worker()
    killer = threading.Thread(target=kill_the_scheduler)
    killer.start()
    begun = time.monotonic()
    with (
        pytest.raises(ClusterlobError) as caught,
        open_workers(ConnectPlace(address=scheduler.address), lambda *_: None) as workers,
    ):
        workers.map("days", partial(leave_process_number_and_sleep, tmp_path), range(3))
    killer.join()
    assert str(caught.value) == (
        f"the Dask scheduler at {scheduler.address} was lost; finished days are kept: "
        "give the same command again"
    )
    assert time.monotonic() - begun < 30


def test_connect__nobody_there_is_one_line(scheduler: Scheduler) -> None:
    place = ConnectPlace(address=scheduler.address, start_timeout="1s")
    with (
        open_workers(place, lambda *_: None) as workers,
        pytest.raises(ClusterlobError, match=r"^workers of .*: none came within 1s; look at whether workers"),
    ):
        workers.map("any", slow_square, [1])
    with (
        open_workers(
            ConnectPlace(address="tcp://127.0.0.1:9", start_timeout="1s"), lambda *_: None
        ) as workers,
        pytest.raises(ClusterlobError, match=r"^workers of tcp://127.0.0.1:9: cannot start: ") as caught,
    ):
        workers.map("any", slow_square, [1])
    assert "\n" not in str(caught.value)


@pytest.fixture
def other_code(tmp_path: Path) -> str:
    """Folder with this package, changed in one place."""
    shutil.copytree(PACKAGE, tmp_path / "other" / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "other" / PACKAGE.name / "kernels.py").open("a") as file:
        file.write("# another version\n")
    return str(tmp_path / "other")


DIFFERS = r"^worker tcp://127\.0\.0\.1:\d+ has clusterlob_gpu \w{12} instead of \w{12}: results could depend"


def test_connect__other_code_is_refused(scheduler: Scheduler, other_code: str) -> None:
    scheduler.add_worker(other_code)
    with (
        open_workers(ConnectPlace(address=scheduler.address), lambda *_: None) as workers,
        pytest.raises(InputError, match=DIFFERS),
    ):
        workers.map("any", slow_square, [1])


def test_connect__other_code_that_joins_late_is_refused(scheduler: Scheduler, other_code: str) -> None:
    scheduler.add_worker()
    with open_workers(ConnectPlace(address=scheduler.address), lambda *_: None) as workers:
        assert workers.map("first", slow_square, [3]) == [9]
        scheduler.add_worker(other_code)
        with pytest.raises(InputError, match=DIFFERS):
            workers.map("then", sleep, [0.1] * 400)


def test_connect__tls(tmp_path: Path) -> None:
    credentials = Security.temporary()
    files = {name: tmp_path / f"{name}.pem" for name in ("ca_file", "cert", "key")}
    files["ca_file"].write_text(credentials.tls_ca_file)
    files["cert"].write_text(credentials.tls_client_cert)
    files["key"].write_text(credentials.tls_client_key)
    options = [f"--tls-{name.replace('_', '-')}={file}" for name, file in files.items()]
    tls = {name: str(file) for name, file in files.items()}
    with closing(Scheduler(tmp_path, *options)) as scheduler:
        scheduler.add_worker()
        assert scheduler.address.startswith("tls://")
        with open_workers(ConnectPlace(address=scheduler.address, tls=tls), lambda *_: None) as workers:
            assert workers.map("square", slow_square, range(3)) == [0, 1, 4]
        bare = ConnectPlace(address=scheduler.address, start_timeout="2s")
        with (
            open_workers(bare, lambda *_: None) as workers,
            pytest.raises(ClusterlobError, match=r"cannot start: .*TLS"),
        ):
            workers.map("square", slow_square, range(3))
    absent = ConnectPlace(address="tls://127.0.0.1:9", tls=tls | {"key": str(tmp_path / "no.pem")})
    with (
        open_workers(absent, lambda *_: None) as workers,
        pytest.raises(InputError, match=r"no\.pem: no such file; tls needs the PEM files"),
    ):
        workers.map("square", slow_square, range(3))
