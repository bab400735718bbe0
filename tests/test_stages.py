"""What is blamed when a task fails, when trying again ends, and what a run says it has seen."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from clusterlob_gpu.errors import LakeError, TasksFailed, WorkerLostError
from clusterlob_gpu.pipeline.run import Bad, what_was_seen, without_bad_days
from clusterlob_gpu.pipeline.stages import BadDaysError, blaming

DAY = dt.date(2024, 5, 1)


@dataclass(frozen=True)
class Job:
    """As much of a DayJob as is blamed."""

    day: dt.date = DAY
    lake: Any = field(default_factory=lambda: SimpleNamespace(symbol=SimpleNamespace(name="AAA")))


def lake_error(message: str, table: str, day: dt.date) -> LakeError:
    error = LakeError(message)
    error.table, error.day = table, day  # type: ignore[attr-defined]
    return error


def test_blaming__names_the_partition_of_the_error_or_the_table_of_the_stage() -> None:
    other = DAY + dt.timedelta(days=1)
    failed: dict[int, Exception] = {
        0: lake_error("torn", "trades", other),
        2: WorkerLostError("label: its worker died 4 times"),
    }
    with pytest.raises(BadDaysError) as caught, blaming([Job(), Job(), (Job(), None)], "book_snapshot_25"):
        raise TasksFailed("label", failed)
    assert set(caught.value.days["AAA"]) == {("trades", other), ("book_snapshot_25", DAY)}
    assert str(caught.value) == f"torn (bad as well: AAA {DAY})"
    assert caught.value.exit_code == 1
    about = caught.value.days["AAA"]["book_snapshot_25", DAY]
    assert str(about) == f"AAA {DAY}: label: its worker died 4 times"


def test_blaming__a_task_without_a_day_stays_what_it_is() -> None:
    with pytest.raises(TasksFailed), blaming([SimpleNamespace()], "trades"):
        raise TasksFailed("fit", {0: WorkerLostError("fit: its worker died")})


def request(on_bad_day: str) -> Any:
    return SimpleNamespace(config=SimpleNamespace(on_bad_day=on_bad_day))


def test_without_bad_days__leaves_out_until_it_succeeds() -> None:
    tried: list[Bad] = []

    def attempt(bad: Bad) -> int:
        tried.append({name: dict(days) for name, days in bad.items()})
        known = bad.get("AAA", {})
        for table in ("trades", "quotes"):
            if (table, DAY) not in known:
                raise BadDaysError({"AAA": {(table, DAY): LakeError(table)}})
        return 7

    assert without_bad_days(request("skip"), attempt) == 7
    assert [sorted(table for table, _ in bad.get("AAA", {})) for bad in tried] == [
        [],
        ["trades"],
        ["quotes", "trades"],
    ]
    with pytest.raises(BadDaysError, match="trades"):
        without_bad_days(request("fail"), attempt)


def test_without_bad_days__ends_where_leaving_out_does_not_help() -> None:
    tries: list[int] = []

    def attempt(_: Bad) -> None:
        tries.append(1)
        raise BadDaysError({"AAA": {("trades", DAY): WorkerLostError("too large")}})

    with pytest.raises(BadDaysError, match="too large"):
        without_bad_days(request("skip"), attempt)
    assert len(tries) == 2


def test_what_was_seen__of_a_partition_that_changed_matches_nothing() -> None:
    one, other = {"trades 2024-05-01": "a", "quotes 2024-05-01": None}, {"trades 2024-05-01": "b"}
    assert what_was_seen([("B", one), ("A", None)]) == {"lake": {"A": {}, "B": dict(sorted(one.items()))}}
    for order in ([one, other], [other, one], [one, other, one]):
        held = what_was_seen([("B", seen) for seen in order])["lake"]["B"]
        assert held == {"quotes 2024-05-01": None, "trades 2024-05-01": "changed"}
