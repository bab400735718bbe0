"""The processes beside the command: the same results with them, without them, and after their death."""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
from asked import asleep, dying, in_turn, numbers
from test_evaluation import WIDTH, buckets_of
from test_flow_evaluation import made_bars, plan
from test_report import make_run

from clusterlob_gpu import beside, cores, flow_evaluation
from clusterlob_gpu.evaluation import Target, cluster_ic
from clusterlob_gpu.page import Picture, draw, write
from clusterlob_gpu.report import drawings, render_run

# Processes of tests may have threads of their runner; what is forked here uses nothing of theirs.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a command on a machine with two cores."""
    monkeypatch.setattr(cores, "available", lambda: 2)
    monkeypatch.setattr(threading, "active_count", lambda: 1)


@pytest.fixture
def there(able: None) -> Iterator[None]:
    with beside.helpers():
        yield


@pytest.fixture
def only_there(there: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is done by the command if the others fail."""

    def result(connection: Connection, here: object) -> Any:
        with connection:
            return connection.recv()

    monkeypatch.setattr(beside, "_result", result)


def mine() -> list[psutil.Process]:
    """Processes that descend from this one."""
    return psutil.Process().children(recursive=True)


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in render_run(out)}


# ---- asking ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tables", "pictures"])
@pytest.mark.parametrize("hands", [1, 2])
def test_ask__is_done_by_others(there: None, kind: beside.Kind, hands: int) -> None:
    found = beside.ask(kind, numbers, hands=hands)()
    assert [square for square, _ in found] == [0, 1, 4, 9, 16, 25]
    assert os.getpid() not in {who for _, who in found}


def test_ask__answers_are_told_apart(there: None) -> None:
    """Answered in another order than asked, one of them never waited for."""
    asked = [beside.ask("tables", in_turn, number) for number in range(4)]
    assert [asked[number]() for number in (3, 0, 2)] == [(3, False), (0, False), (2, False)]


def test_ask__dies_with_all_its_hands(there: None) -> None:
    """A process with hands at work is killed: they may not go on, nor keep its answer waiting."""
    asked = beside.ask("tables", asleep, os.getpid(), hands=2)
    deadline, hands = time.monotonic() + 60, []
    while len(hands) < 2:
        assert time.monotonic() < deadline
        found = [(one, one.children()) for helper in psutil.Process().children() for one in helper.children()]
        (doing, hands) = next(((one, its) for one, its in found if len(its) == 2), (None, []))
    assert doing is not None
    doing.kill()
    assert asked() == "done"
    assert not psutil.wait_procs(hands, timeout=10)[1]


@pytest.mark.parametrize("how", ["fails", "dies", "a hand dies"])
def test_ask__what_fails_is_done_by_the_command(there: None, how: str) -> None:
    assert beside.ask("tables", dying, how, os.getpid(), hands=2)() == "done"
    assert beside.ask("tables", in_turn, 7)() == (7, False)


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_ask__of_one_that_has_died(there: None, when: str) -> None:
    assert beside.ask("tables", in_turn, 1)() == (1, False)
    waiting = beside.ask("tables", in_turn, 0)
    for process in psutil.Process().children():
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert (waiting if when == "meanwhile" else beside.ask("tables", in_turn, 0))() == (0, True)


@pytest.mark.parametrize(
    ("where", "what", "number"),
    [(cores, "available", 1), (threading, "active_count", 2)],
    ids=["core", "threads"],
)
def test_helpers__need_a_core_of_their_own_and_no_threads(
    able: None, monkeypatch: pytest.MonkeyPatch, where: ModuleType, what: str, number: int
) -> None:
    monkeypatch.setattr(where, what, lambda: number)
    with beside.helpers():
        assert beside.ask("tables", in_turn, 1)() == (1, True)


def test_helpers__end_with_all_that_they_have_begun(able: None) -> None:
    before = set(mine())
    with beside.helpers():
        beside.ask("tables", in_turn, 1)()
        beside.ask("tables", in_turn, 0)
        begun = set(mine()) - before
        assert begun
    assert not psutil.wait_procs(begun, timeout=10)[1]
    assert beside.ask("tables", in_turn, 1)() == (1, True)


def test_helpers__end_when_the_command_was_killed(able: None, tmp_path: Path) -> None:
    """With all that they have begun: nobody is left to tell them."""
    command = os.fork()
    if not command:
        try:
            with beside.helpers():
                beside.ask("tables", asleep, os.getpid(), hands=2)
                while len(mine()) < 5:
                    time.sleep(0.01)
                (tmp_path / "pids").write_text(" ".join(str(one.pid) for one in mine()))
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    os.waitpid(command, 0)
    begun = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(begun) == 5
    deadline = time.monotonic() + 60
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in begun):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("what", ["fork", "socketpair"])
@pytest.mark.parametrize("since", [0, 1])
def test_helpers__that_the_system_does_not_allow(
    able: None, monkeypatch: pytest.MonkeyPatch, what: str, since: int
) -> None:
    """As with a limit on processes or on open files: the command does it alone, and nothing is left."""
    before, opened, calls = set(mine()), len(os.listdir("/proc/self/fd")), count()
    where: Any = os if what == "fork" else socket
    real = getattr(where, what)

    def scarce() -> Any:
        if next(calls) >= since:
            raise BlockingIOError(errno.EAGAIN, "no more of them")
        return real()

    with monkeypatch.context() as limited:
        limited.setattr(where, what, scarce)
        with beside.helpers():
            assert beside.ask("pictures", in_turn, 1)() == (1, True)
            assert beside.ask("tables", in_turn, 1)()[0] == 1
    assert not psutil.wait_procs(set(mine()) - before, timeout=10)[1]
    assert len(os.listdir("/proc/self/fd")) == opened


def test_ask__without_a_file_to_spare(there: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left() -> Any:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(socket, "socketpair", none_left)
    assert beside.ask("tables", in_turn, 1)() == (1, True)


def test_helpers__where_nobody_is_told_of_children_that_end(able: None) -> None:
    told = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with beside.helpers():
            assert beside.ask("tables", in_turn, 1)() == (1, False)
    finally:
        signal.signal(signal.SIGCHLD, told)


# ---- tables and pictures ----------------------------------------------------------------------------


def test_tables__are_the_same(only_there: None) -> None:
    table = made_bars(6)
    alone = flow_evaluation.flow_tables(table, plan())
    for hands in (1, 3):
        found = beside.ask("tables", flow_evaluation.flow_tables, table, plan(), hands=hands)()
        assert list(found) == list(alone) == list(flow_evaluation.TABLES)
        for name, one in alone.items():
            pd.testing.assert_frame_equal(found[name], one, check_exact=True)


def test_ics__are_the_same(only_there: None) -> None:
    buckets = buckets_of(np.random.default_rng(5), ("A", "B"))
    ahead = [Target(name, name, WIDTH) for name in ("conr", "frnb")]
    makers = (
        partial(flow_evaluation.flow_ic, made_bars(6), plan()),
        partial(cluster_ic, buckets, ahead, width_us=WIDTH, draws=50),
    )
    for make in makers:
        for hands in (1, 2):
            found = beside.ask("tables", make, hands=hands)()
            pd.testing.assert_frame_equal(found, make(), check_exact=True)


def test_pictures__are_the_same_files(
    tmp_path: Path, only_there: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = make_run(tmp_path / "run")
    with_them = files(out)
    with monkeypatch.context() as alone:
        alone.setattr(beside, "_lines", {})
        assert files(out) == with_them


def test_pictures__are_all_drawn(tmp_path: Path, only_there: None) -> None:
    out = make_run(tmp_path / "run")
    drawn = beside.ask("pictures", draw, out, drawings, hands=2)()
    assert drawn == [Picture(one.symbol, one.name, one.caption) for one in drawings(out)]
    found = list((out / "plots").iterdir())
    assert len(found) == len(drawn) > 2
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in found)


def test_pictures__that_fail_are_left_to_the_command(tmp_path: Path, there: None) -> None:
    """A file where the folder of the pictures should be: the command is the one to say so."""
    out = make_run(tmp_path / "run")
    (out / "plots").write_text("")
    with pytest.raises(FileExistsError):
        render_run(out)


def test_pictures__make_no_folder_of_a_run_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "gone" / "plots" / "one.png", b"")
    assert not list(tmp_path.iterdir())


# ---- cores ------------------------------------------------------------------------------------------


def test_cores__are_those_that_no_task_has() -> None:
    seen = []

    @cores.taking_one
    def task(most: int) -> int:
        with cores.spare(most) as more:
            seen.append(more)
            if len(seen) == 1:
                task(5)
        return more

    assert task(5) == 0
    with cores.shared(4):
        seen.clear()
        assert task(2) == 2
        assert seen == [2, 0]
        assert task(9) == 3
    with cores.spare(9) as more:
        assert more == 0


def test_cores__of_a_task_that_fails_are_given_back() -> None:
    @cores.taking_one
    def task() -> None:
        with cores.spare(1):
            raise ValueError("of its own")

    with cores.shared(2):
        with pytest.raises(ValueError, match="of its own"):
            task()
        with cores.spare(9) as more:
            assert more == 2


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({}, 8),
    ],
)
def test_available__is_bounded_by_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(cores, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert cores.available() == expected


def test_ahead__makes_the_next_while_one_is_used() -> None:
    made = []

    def items() -> Iterator[int]:
        for number in range(3):
            made.append(number)
            yield number

    def seen(cores_: int) -> list[list[int]]:
        """What had been made when each item was given, and a moment later."""
        made.clear()
        found = []
        with cores.shared(cores_):
            for number in cores.ahead(items()):
                deadline = time.monotonic() + 10
                while cores_ and len(made) < min(number + 2, 3) and time.monotonic() < deadline:
                    time.sleep(0.001)
                found.append(made.copy())
        return found

    assert seen(0) == [[0], [0, 1], [0, 1, 2]]
    assert seen(1) == [[0, 1], [0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("at_hand", [0, 1])
def test_ahead__error_comes_after_the_items_before_it(at_hand: int) -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("of the second")

    with cores.shared(at_hand):
        found = cores.ahead(items())
        assert next(found) == 1
        with pytest.raises(ValueError, match="of the second"):
            next(found)
        with cores.spare(9) as more:
            assert more == at_hand


def test_ahead__left_early_gives_its_core_back() -> None:
    with cores.shared(1):
        for _ in cores.ahead(iter(range(9))):
            with cores.spare(9) as more:
                assert more == 0
            break
        with cores.spare(9) as more:
            assert more == 1
