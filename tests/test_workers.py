"""Threads and Dask workers do the same: results in order, errors raised, progress told."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clusterlob_gpu.errors import ConfigError, LakeError
from clusterlob_gpu.workers import Place, Workers, open_workers, read_place

Told = list[tuple[str, int, int]]


def slow_square(x: int) -> int:
    """The first items take longest: results arrive in another order than they are asked for."""
    time.sleep(0.02 * (3 - x % 4))
    return x * x


def fail_at_five(x: int) -> int:
    if x == 5:
        raise LakeError(f"item {x} is broken")
    return x


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


def test_map__error_is_raised_and_the_workers_live_on(opened: tuple[Workers, Told]) -> None:
    workers, _ = opened
    with pytest.raises(LakeError, match=r"^item 5 is broken$"):
        workers.map("fail", fail_at_five, range(40))
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


# ---- places -----------------------------------------------------------------------------------------


def test_read_place__numbers_names_and_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("kind: threads\nn_workers: 5\n")
    assert read_place(None) == Place(kind="threads", n_workers=os.cpu_count() or 1)
    assert read_place("3") == Place(kind="local", n_workers=3, threads_per_worker=1)
    assert read_place(str(file)) == Place(kind="threads", n_workers=5)
    assert read_place("local_cpu") == Place(kind="local", n_workers=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: moon\n", "kind = 'moon': "),
        ("kind: local\nn_workers: 0\n", "n_workers = 0: .*greater than or equal to 1"),
        ("kind: local\nworkers: 3\n", "workers = 3: "),
        ("n_workers: 3\n", "kind = "),
        ("[1, 2]\n", "must hold keys and values, found a list"),
        ("kind: [\n", "not valid YAML"),
    ],
)
def test_read_place__broken_file_names_the_field(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_place(str(file))
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere", "0", "-1", ""])
def test_read_place__unknown_name_tells_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"--workers {name}: no such place; there are .*local_cpu"):
        read_place(name)


def test_read_place__absent_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read: No such file"):
        read_place(str(tmp_path / "absent.yaml"))
