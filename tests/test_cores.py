"""Cores that have no task: who makes an item, and that all come back."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from clusterlob_gpu import cores


def makers(number: int, failing: int | None = None) -> Iterator[int]:
    """The threads that make the items."""
    for at in range(number):
        if at == failing:
            raise ValueError(at)
        yield threading.get_ident()


def test_ahead__makes_items_here_where_no_core_is_free() -> None:
    with cores.given(1):
        found = cores.task(lambda: list(cores.ahead(makers(4))))
    assert found == [threading.get_ident()] * 4
    assert list(cores.ahead(makers(2))) == [threading.get_ident()] * 2


def test_ahead__has_a_free_core_make_the_next() -> None:
    with cores.given(2):
        first, *others = cores.task(lambda: list(cores.ahead(makers(4))))
    assert first == threading.get_ident()
    assert len(set(others)) == 1
    assert others[0] != first


def test_ahead__takes_a_core_only_while_one_is_free() -> None:
    with cores.given(2):
        items = cores.ahead(makers(3))
        next(items)
        (beside,) = {cores.task(lambda: cores.task(lambda: next(items)))}
        assert beside != threading.get_ident(), "begun while one was free"
        assert cores.task(lambda: cores.task(lambda: list(items))) != []


@pytest.mark.parametrize("failing", [0, 1, 3])
def test_ahead__gives_its_core_back(failing: int) -> None:
    """After an error, and where nobody wants the rest."""
    with cores.given(1):
        with pytest.raises(ValueError, match=str(failing)):
            list(cores.ahead(makers(4, failing)))
        unwanted = cores.ahead(makers(4))
        next(unwanted)
        unwanted.close()  # type: ignore[attr-defined]
        assert len(set(list(cores.ahead(makers(3)))[1:]) - {threading.get_ident()}) == 1
    assert list(cores.ahead(makers(1))) == [threading.get_ident()]
    assert not cores._cores.take()
