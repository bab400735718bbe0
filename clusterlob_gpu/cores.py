"""Cores of this process that have no task: the last tasks of a stage may use them beside their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import ParamSpec, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
P = ParamSpec("P")


class _Cores:
    """Counts the cores that have no task; none but inside `given`."""

    def __init__(self) -> None:
        self._lock, self._free = Lock(), 0

    def add(self, number: int) -> None:
        """Cores more, or fewer, that are free; those of tasks may be asked for before others are back."""
        with self._lock:
            self._free += number

    def take(self) -> bool:
        """Take one if there is one."""
        with self._lock:
            found = self._free > 0
            self._free -= found
        return found


_cores = _Cores()


@contextmanager
def given(number: int) -> Iterator[None]:
    """So many tasks may run at once in this block, each by `task`."""
    _cores.add(number)
    try:
        yield
    finally:
        _cores.add(-number)


def task(function: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
    """What a function gives, with a core of its own."""
    _cores.add(-1)
    try:
        return function(*args, **kwargs)
    finally:
        _cores.add(1)


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The items; where a core is free, it makes the next one while this one is in use."""
    end = object()
    with ThreadPoolExecutor(1) as beside:
        coming: Future[Item | object] | None = None
        while (item := next(items, end) if coming is None else coming.result()) is not end:
            coming = beside.submit(_next, items, end) if _cores.take() else None
            yield item  # type: ignore[misc]


def _next(items: Iterator[Item], end: object) -> Item | object:
    try:
        return next(items, end)
    finally:
        _cores.add(1)
