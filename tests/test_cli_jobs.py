"""The commands around runs: plans, sweeps, what is there, cleaning, submission."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import yaml
from conftest import S3
from lakes import DAYS, EXCHANGE, SYMBOL
from test_cli import SMALL, Run, asked, assert_refused, clusterlob, lake, script

__all__ = ["clusterlob", "lake", "script"]


def nothing_in(folder: Path) -> bool:
    return not folder.exists() or list(folder.iterdir()) == []


# ---- plans ------------------------------------------------------------------------------------------


def test_dry_run__tells_days_gaps_and_stages_and_writes_nothing(
    clusterlob: Run, lake: Path, tmp_path: Path
) -> None:
    arguments = ["run", "cluster", *asked(lake, tmp_path / "runs" / "out", end=DAYS[2]), *SMALL]
    code, out, err = clusterlob(*arguments, "--set", "on_bad_day=skip", "--dry-run")
    assert (code, err) == (0, "")
    assert f"{DAYS[0]} to {DAYS[1]}" in out
    assert DAYS[2] in out  # the gap
    assert "1,200" in out
    assert "not known yet" in out
    assert "up to 2" in out
    assert "memory: a worker of " in out
    assert nothing_in(tmp_path)
    assert_refused(
        clusterlob(*arguments, "--dry-run"), f"no trades for {EXCHANGE} {SYMBOL} on {DAYS[2]}", tmp_path
    )


def test_dry_run__knows_what_a_run_has_left(clusterlob: Run, lake: Path, tmp_path: Path) -> None:
    arguments = ["run", "cluster", *asked(lake, tmp_path / "out")]
    assert clusterlob(*arguments, *SMALL)[0] == 0

    def rows(*settings: str) -> dict[str, list[str]]:
        code, out, _ = clusterlob(*arguments, *SMALL, *settings, "--dry-run")
        assert code == 0
        cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines()]
        return {row[0]: row[1:] for row in cells if len(row) == 4}

    same = rows()
    assert same["book"] == ["3", "0", ""]  # the day after the range has the last returns
    assert [row[1] for row in same.values()] == ["0"] * len(same)
    other = rows("--set", "k=4")
    assert other["features"] == ["2", "0", ""]
    assert other["fit"] == ["0", "1", "config.k 3 -> 4 (1)"]
    assert other["label"] == ["not known yet", "up to 2", ""]
    assert rows("--set", "depth=3")["book"] == ["0", "3", "depth 5 -> 3 (3)"]


def test_dry_run__says_when_a_worker_has_too_little_memory(
    clusterlob: Run, lake: Path, tmp_path: Path
) -> None:
    place = tmp_path / "small.yaml"
    place.write_text("kind: local\nn_workers: 1\nmemory_limit: 100MiB\n")
    code, out, _ = clusterlob(
        "run", "cluster", *asked(lake, tmp_path / "out"), *SMALL, "--workers", place, "--dry-run"
    )
    assert code == 0
    assert "more than its 100.0 MiB: give it more memory or fewer threads" in out


# ---- sweeps -----------------------------------------------------------------------------------------


@pytest.fixture
def sweep_file(tmp_path: Path) -> Path:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "exchange": EXCHANGE,
                "symbols": [SYMBOL],
                "start": DAYS[0],
                "end": DAYS[1],
                "config": {"window": 20},
                "grid": {"k": [2, 3]},
                "trials": [{"k": 65}],
            }
        )
    )
    return file


def test_sweep__runs_shows_and_is_found_again(
    script: Run, lake: Path, tmp_path: Path, sweep_file: Path
) -> None:
    out = tmp_path / "runs" / "sweep"
    code, planned, err = script("sweep", sweep_file, "--lake", lake, "--out", out, "--dry-run")
    assert (code, err) == (0, "")
    assert "3 trials" in planned
    assert "k = 65" in planned
    assert nothing_in(tmp_path / "runs")
    code, shown, err = script("sweep", sweep_file, "--lake", lake, "--out", out)
    assert (code, err) == (0, "")
    assert f"report: {out / 'report.html'}" in shown
    assert (out / "report.html").exists()
    assert json.loads((out / "run.json").read_text())["failed"] == 1
    assert script("info", out) == (0, shown, "")
    lines = (tmp_path / "runs" / "logs" / "runs.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["status"] for line in lines) == ["done", "done", "done", "failed"]


def test_sweep__without_failures_is_left_as_it_is(
    clusterlob: Run, lake: Path, tmp_path: Path, sweep_file: Path
) -> None:
    sweep_file.write_text(sweep_file.read_text().replace("- k: 65", "- k: 4"))
    arguments = ["sweep", sweep_file, "--lake", lake, "--out", tmp_path / "sweep"]
    assert clusterlob(*arguments)[::2] == (0, "")
    code, _, err = clusterlob(*arguments)
    assert (code, err) == (0, "up to date: the same was asked for, and neither lake nor code has changed\n")
    assert len((tmp_path / "logs" / "runs.jsonl").read_text().splitlines()) == 4


def test_sweep__bad_file_is_refused(clusterlob: Run, lake: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    file = tmp_path / "sweep.yaml"
    file.write_text("grid: {k: [2]}\n")
    arguments = ["sweep", file, "--lake", lake, "--out", out / "sweep"]
    assert_refused(clusterlob(*arguments), f"{file}: exchange", out)
    assert_refused(clusterlob("sweep", "nowhere.yaml", *arguments[2:]), "nowhere.yaml: cannot be read", out)


# ---- what is there ----------------------------------------------------------------------------------


def test_info__store_and_nothing(clusterlob: Run, lake: Path, tmp_path: Path) -> None:
    assert clusterlob("run", "cluster", *asked(lake, tmp_path / "out"), *SMALL)[0] == 0
    code, out, err = clusterlob("info", tmp_path / "store")
    assert (code, err) == (0, "")
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines()]
    assert {row[0]: row[1] for row in rows if len(row) == 6} == {
        "book": "3",
        "tail": "1",
        "features": "2",
        "sample": "2",
        "fit": "1",
        "label": "2",
        "mids": "3",
        "tables": "1",
    }
    (tmp_path / "empty").mkdir()
    code, out, err = clusterlob("info", tmp_path / "empty")
    assert (code, out) == (2, "")
    assert err == f"error: {tmp_path / 'empty'}: neither a run nor a store with artefacts\n"


def test_info__a_run_that_was_cut_off(clusterlob: Run, tmp_path: Path) -> None:
    work = tmp_path / ".out.partial"
    work.mkdir()
    attempt = {"id": "x", "asked": "y", "started_at": "then", "number": 2, "host": "here", "pid": 77}
    (work / "attempt.json").write_text(json.dumps(attempt))
    progress = {"stage": "features", "done": 3, "of": 7, "at": time.time()}
    (work / "progress.json").write_text(json.dumps(progress))
    code, out, err = clusterlob("info", tmp_path / "out")
    assert (code, err) == (0, "")
    assert out == (
        "cut off at features, 3 of 7 (try 2, process 77 on here); "
        "give the same command again to go on from the finished days\n"
    )


def test_clean__by_age(clusterlob: Run, lake: Path, tmp_path: Path) -> None:
    assert clusterlob("run", "cluster", *asked(lake, tmp_path / "out"), *SMALL)[0] == 0
    store = tmp_path / "store"
    for path in (store / "features").rglob("*"):
        os.utime(path, (time.time() - 3 * 86_400,) * 2)
    code, out, _ = clusterlob("clean", store, "--unused", "2d", "--dry-run")
    assert code == 0
    assert "would be removed" in out
    assert len(list((store / "features").glob("*/*/*"))) == 2
    assert clusterlob("clean", store, "--unused", "2d", "--max-size", "100GB")[0] == 0
    assert list((store / "features").glob("*/*/*")) == []
    assert len(list((store / "book").glob("*/*/*"))) == 3
    # What is left serves the next run.
    assert clusterlob("run", "cluster", *asked(lake, tmp_path / "again"), *SMALL)[0] == 0
    made = json.loads((tmp_path / "again" / "run.json").read_text())["artefacts"]
    assert {name: held["made"] for name, held in made.items() if held["made"]} == {"features": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "clean: give --unused, --max-size, or both"),
        (["--unused", "soon"], "--unused soon: must be a positive duration"),
        (["--max-size", "large"], "--max-size large: "),
    ],
)
def test_clean__bad_input(clusterlob: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    assert_refused(clusterlob("clean", tmp_path, *arguments), message, tmp_path)


# ---- object stores, submission ----------------------------------------------------------------------


def test_s3__addresses_pass_through_the_command_line(
    clusterlob: Run, lake: Path, tmp_path: Path, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    there = s3.upload(lake, s3 / "deep/lake")
    store = s3 / "store"
    arguments = asked(there, tmp_path / "out")  # type: ignore[arg-type]
    code, _, err = clusterlob("run", "cluster", *arguments, *SMALL, "--store", store)
    assert (code, err) == (0, "")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["lake"]["path"] == str(there)
    code, out, err = clusterlob("info", store)
    assert (code, err) == (0, "")
    assert "features" in out
    code, out, err = clusterlob("check", "--lake", there)
    assert (code, err) == (0, "")
    assert SYMBOL in out
    code, out, err = clusterlob("ingest", "synthetic", "--lake", there)
    assert (code, out) == (2, "")
    assert "must be a folder; make it there and copy it to the object store" in err
    code, out, err = clusterlob("info", "gs://bucket/store")
    assert (code, out) == (2, "")
    assert "gs://bucket/store: must be a path or s3://bucket/prefix" in err


def test_submit__dry_run_shows_the_job(clusterlob: Run, lake: Path, tmp_path: Path) -> None:
    command = ["run", "cluster", *asked(lake, tmp_path / "out"), *SMALL]
    code, out, err = clusterlob("submit", "--to", "slurm_gpu", "--dry-run", "--", *command)
    assert (code, err) == (0, "")
    assert out.startswith("#!/")
    assert "run cluster --lake" in out
    assert "--set window=20" in out
    assert "slurm_gpu.yaml" in out
    assert_refused(
        clusterlob("submit", "--to", "local_cpu", "--dry-run", "--", *command), "local_cpu", tmp_path
    )
    assert_refused(clusterlob("submit", "--to", "slurm_gpu", "--", "info", "x"), "info", tmp_path)
