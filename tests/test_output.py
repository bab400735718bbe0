"""Runs that replace each other whole, go on after a kill as the same run, and a ledger without doubles."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from clusterlob_gpu.errors import InputError
from clusterlob_gpu.output import RunDirectory, append_ledger, read_ledger, read_seen, unfinished, work_folder

ASKED = "0123456789abcdef"


def content(root: Path) -> list[str]:
    """Every file and folder below, hidden ones included, but for the logs."""
    found = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    return [path for path in found if "logs" not in path]


def publish_run(out: Path, mark: int, asked: str = ASKED) -> str:
    with RunDirectory(out, asked) as run:
        run.write_table("buckets", pd.DataFrame({"mark": [mark]}))
        run.write_run({"mark": mark})
        run.write_seen({"code": "c", "lake": {"AAA": {"trades 2024-05-01": "f"}}})
        run.publish([{"id": run.attempt.id, "status": "done"}])
        return run.attempt.id


def test_run_directory__is_published_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    with RunDirectory(out, ASKED) as run:
        run.write_table("buckets", pd.DataFrame({"mark": [1]}))
        run.write_run({"mark": 1})
        assert not out.exists()
        run.publish([])
    assert content(tmp_path) == [
        "deep",
        "deep/run",
        "deep/run/results",
        "deep/run/results/buckets.parquet",
        "deep/run/run.json",
    ]
    assert json.loads((out / "run.json").read_text()) == {"mark": 1}
    assert pd.read_parquet(out / "results" / "buckets.parquet")["mark"].tolist() == [1]


def test_run_directory__takes_the_place_of_an_old_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = publish_run(out, 1)
    (out / "results" / "extra.parquet").write_text("of the old run")
    assert publish_run(out, 2) != first
    assert json.loads((out / "run.json").read_text()) == {"mark": 2}
    files = ["run/inputs.json", "run/results", "run/results/buckets.parquet", "run/run.json"]
    assert content(tmp_path) == ["run", *files]


def test_run_directory__a_failing_run_leaves_the_old_one(tmp_path: Path) -> None:
    out = tmp_path / "run"
    publish_run(out, 1)
    before = content(tmp_path)

    def fail() -> None:
        with RunDirectory(out, ASKED) as run:
            run.write_run({"mark": 2})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert content(tmp_path) == before
    assert json.loads((out / "run.json").read_text()) == {"mark": 1}


def test_run_directory__refuses_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(InputError, match="exists and is not a run; choose an empty or new directory"):
            RunDirectory(out, ASKED)
    with pytest.raises(InputError, match=r"notes\.txt is not a folder that can be written to"):
        RunDirectory(tmp_path / "notes.txt" / "run", ASKED)
    (tmp_path / "empty").mkdir()
    publish_run(tmp_path / "empty", 3)
    assert json.loads((tmp_path / "empty" / "run.json").read_text()) == {"mark": 3}
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_run_directory__belongs_to_one_process_at_a_time(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run", ASKED), RunDirectory(tmp_path / "other", ASKED):
        with pytest.raises(InputError, match="run: another process is making this run"):
            RunDirectory(tmp_path / "run", ASKED).__enter__()
        assert (unfinished(tmp_path / "run") or {})["running"]
    publish_run(tmp_path / "run", 1)


def test_read_seen__knows_the_run_that_was_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert read_seen(out, ASKED) is None
    publish_run(out, 1)
    assert read_seen(out, ASKED) == {"code": "c", "lake": {"AAA": {"trades 2024-05-01": "f"}}}
    assert read_seen(out, "f" * 16) is None
    (out / "run.json").unlink()
    assert read_seen(out, ASKED) is None


# ---- after a kill -----------------------------------------------------------------------------------

_HANGS = """
import sys, time
from pathlib import Path
from clusterlob_gpu.output import RunDirectory
with RunDirectory(Path(sys.argv[1]), sys.argv[2]) as run:
    run.write_run({"mark": 1})
    run.progress("features", 3, 7)
    print(run.attempt.id, flush=True)
    time.sleep(600)
"""


def killed_run(out: Path, asked: str = ASKED) -> str:
    """Begin a run in a process of its own and kill it with -9; gives the run's id."""
    child = subprocess.Popen([sys.executable, "-c", _HANGS, out, asked], stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdout is not None
        name = child.stdout.readline().strip()
        assert (unfinished(out) or {})["running"]
        os.kill(child.pid, signal.SIGKILL)
    return name


def test_killed_run__goes_on_as_the_same_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    name = killed_run(out)
    found = unfinished(out) or {}
    assert (found["id"], found["running"], found["number"]) == (name, False, 1)
    assert (found["progress"]["stage"], found["progress"]["done"], found["progress"]["of"]) == (
        "features",
        3,
        7,
    )
    assert killed_run(out) == name
    assert (unfinished(out) or {})["number"] == 2
    with RunDirectory(out, ASKED) as run:
        assert (run.attempt.id, run.attempt.number) == (name, 3)
        assert content(work_folder(out)) == ["attempt.json", "results"]
    assert content(tmp_path) == []


def test_killed_run__is_forgotten_when_something_else_is_asked(tmp_path: Path) -> None:
    name = killed_run(tmp_path / "run")
    assert publish_run(tmp_path / "run", 1, "f" * 16) != name
    assert content(tmp_path)[0] == "run"


def test_publish__killed_between_ledger_and_rename_leaves_one_line(tmp_path: Path) -> None:
    """The line is written first: the second try finds it there."""
    name = killed_run(tmp_path / "run")
    line = {"id": name, "status": "done", "seconds": 1.5, "attempts": 1}
    append_ledger(tmp_path, [line])
    assert publish_run(tmp_path / "run", 2) == name
    assert read_ledger(tmp_path) == [line]


def test_ledger__a_run_that_went_on_with_other_numbers_says_so(tmp_path: Path) -> None:
    """Its lake was changed between two tries: both lines are true of what was there then."""
    lines = [{"id": "a", "status": "done", "headline": value} for value in (0.1, -0.2, 0.1)]
    for line in lines:
        append_ledger(tmp_path, [line])
    assert read_ledger(tmp_path) == lines[:2]


def test_publish__a_kill_between_two_renames_loses_no_run(tmp_path: Path) -> None:
    publish_run(tmp_path / "run", 1)
    (tmp_path / "run").rename(tmp_path / ".run.0123.old")
    with RunDirectory(tmp_path / "run", "f" * 16):
        assert json.loads((tmp_path / "run" / "run.json").read_text()) == {"mark": 1}
    publish_run(tmp_path / "run", 2)
    assert [path.name for path in tmp_path.iterdir() if path.name != "logs"] == ["run"]


def test_read_seen__knows_when_results_are_no_longer_what_was_written(tmp_path: Path) -> None:
    out = tmp_path / "run"
    publish_run(out, 1)
    assert read_seen(out, ASKED) is not None
    (out / "results" / "buckets.parquet").write_bytes(b"")
    assert read_seen(out, ASKED) is None


# ---- the ledger -------------------------------------------------------------------------------------


def _append_many(task: tuple[Path, int]) -> None:
    root, writer = task
    for number in range(25):
        line: dict[str, Any] = {"id": f"{writer}-{number}", "status": "done", "writer": writer}
        append_ledger(root, [line | {"number": number, "text": "x" * 5_000, "path": root}])
        append_ledger(root, [{"id": number, "status": "done", "shared": True}])


def test_ledger__lines_of_several_processes_are_whole_and_single(tmp_path: Path) -> None:
    append_ledger(tmp_path, [{"id": "first", "status": "done"}])
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        list(pool.map(_append_many, [(tmp_path, writer) for writer in range(4)]))
    lines = (tmp_path / "logs" / "runs.jsonl").read_text().splitlines()
    first, *rest = (json.loads(line) for line in lines)
    assert first == {"id": "first", "status": "done"}
    own = [line for line in rest if "writer" in line]
    assert len(own) == 100
    for writer in range(4):
        assert [line["number"] for line in own if line["writer"] == writer] == list(range(25))
    assert {line["text"] for line in own} == {"x" * 5_000}
    assert sorted(line["id"] for line in rest if "shared" in line) == list(range(25))


@pytest.mark.parametrize("left", [b'{"id": "half', b"\xff\xfe", b"[1]\n", b"\n"])
def test_ledger__mends_after_a_writer_that_was_killed(tmp_path: Path, left: bytes) -> None:
    append_ledger(tmp_path, [{"id": "a", "status": "done"}])
    with (tmp_path / "logs" / "runs.jsonl").open("ab") as file:
        file.write(left)
    append_ledger(tmp_path, [{"id": "b", "status": "done"}, {"id": "a", "status": "done"}])
    assert [line["id"] for line in read_ledger(tmp_path)] == ["a", "b"]


def test_ledger__a_run_may_fail_and_then_be_done(tmp_path: Path) -> None:
    for status in ("failed", "done", "done"):
        append_ledger(tmp_path, [{"id": "a", "status": status}])
    assert [line["status"] for line in read_ledger(tmp_path)] == ["failed", "done"]


def test_progress__is_noted_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000.0
    monkeypatch.setattr(time, "time", lambda: now)
    with RunDirectory(tmp_path / "run", ASKED) as run:
        for done in range(30):
            now = 1_000 + done / 10
            run.progress("label", done, 30)
        held = json.loads((run.work / "progress.json").read_text())
    assert held == {"stage": "label", "done": 20, "of": 30, "at": 1002.0}
