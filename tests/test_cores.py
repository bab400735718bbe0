"""Cores that tasks leave to one another, and what is done with them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clusterlob_gpu import cores


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


@pytest.mark.parametrize(("shared", "at_once"), [(0, 1), (1, 2), (2, 3), (9, 5)])
def test_spread__is_done_by_as_many_as_there_are_cores(shared: int, at_once: int) -> None:
    seen: list[tuple[int, int]] = []

    def one(number: int) -> None:
        time.sleep(0.02)
        seen.append((number, threading.get_ident()))

    with cores.shared(shared):
        cores.spread(one, range(5))
        with cores.spare(9) as more:
            assert more == shared
    assert sorted(number for number, _ in seen) == [0, 1, 2, 3, 4]
    assert threading.get_ident() in {who for _, who in seen}
    assert len({who for _, who in seen}) == at_once


def test_spread__nothing() -> None:
    cores.spread(pytest.fail, [])


@pytest.mark.parametrize("shared", [0, 1, 9])
def test_spread__tells_the_first_of_two_failures(shared: int) -> None:
    def one(number: int) -> None:
        if number >= 3:
            raise ValueError(number)

    with cores.shared(shared):
        with pytest.raises(ValueError, match="3"):
            cores.spread(one, range(6))
        with cores.spare(9) as more:
            assert more == shared
