"""Artefacts that are whole or absent, runs that replace each other, and the ledger."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from clusterlob_gpu import bars, kernels
from clusterlob_gpu.errors import InputError
from clusterlob_gpu.store import (
    RunDirectory,
    Store,
    append_ledger,
    array_hash,
    artefact_key,
    load_column,
    save_columns,
    source_hash,
)

KEY = artefact_key(day="2024-05-01", depth=5)


def fill_with(text: str) -> Any:
    def fill(folder: Path) -> dict[str, Any]:
        (folder / "a.txt").write_text(text)
        save_columns(folder, x=np.arange(5))
        return {"said": text}

    return fill


def content(root: Path) -> list[str]:
    """Every file and folder below, hidden ones included, but for the logs."""
    found = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    return [path for path in found if "logs" not in path]


# ---- names ------------------------------------------------------------------------------------------


def test_artefact_key__depends_on_every_part_and_not_on_their_order() -> None:
    assert artefact_key(depth=5, day="2024-05-01") == KEY
    others = {artefact_key(day="2024-05-02", depth=5), artefact_key(day="2024-05-01", depth=6), KEY}
    assert len(others) == 3
    assert len(KEY) == 40


def test_array_hash__knows_shape_and_values() -> None:
    x = np.arange(6.0)
    hashes = {array_hash(x), array_hash(x.reshape(2, 3)), array_hash(x.reshape(3, 2)), array_hash(x + 1)}
    assert len(hashes) == 4
    assert array_hash(np.asfortranarray(x.reshape(2, 3))) == array_hash(x.reshape(2, 3))


def test_source_hash__depends_on_file_and_modules() -> None:
    files = {source_hash(__file__, [kernels]), source_hash(__file__, [bars])}
    assert len(files | {source_hash(bars.__file__, [kernels])}) == 3
    assert source_hash(__file__, [kernels]) in files


# ---- artefacts --------------------------------------------------------------------------------------


def test_store__writes_once_and_gives_the_record_back(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.record("book", KEY) is None
    made = store.write("book", KEY, fill_with("first"))
    assert made["said"] == "first"
    assert made["files"] == {"a.txt": 5, "x.npy": (store.path("book", KEY) / "x.npy").stat().st_size}
    assert store.record("book", KEY) == made
    assert store.record("features", KEY) is None
    assert store.write("book", KEY, fill_with("second")) == made
    assert (store.path("book", KEY) / "a.txt").read_text() == "first"
    assert len(list(store.path("book", KEY).parent.iterdir())) == 1


def test_columns__come_back_as_they_were_written(tmp_path: Path) -> None:
    z = np.arange(12, dtype=np.float32).reshape(6, 2)
    save_columns(tmp_path, z=z, none=np.empty(0, np.int64))
    back = load_column(tmp_path, "z")
    np.testing.assert_array_equal(back, z)
    assert back.dtype == np.float32
    back[0, 0] = 99
    assert load_column(tmp_path, "z")[0, 0] == 0
    assert load_column(tmp_path, "none").shape == (0,)


DAMAGE = {
    "file cut off": lambda folder: (folder / "a.txt").write_text("fir"),
    "file gone": lambda folder: (folder / "x.npy").unlink(),
    "record gone": lambda folder: (folder / "record.json").unlink(),
    "record cut off": lambda folder: (folder / "record.json").write_text('{"said": "fi'),
    "record empty": lambda folder: (folder / "record.json").write_text(""),
    "record a list": lambda folder: (folder / "record.json").write_text("[1]"),
    "record without files": lambda folder: (folder / "record.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_store__damage_is_noticed_and_made_good(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path)
    store.write("book", KEY, fill_with("first"))
    DAMAGE[damage](store.path("book", KEY))
    assert store.record("book", KEY) is None
    made = store.write("book", KEY, fill_with("again"))
    assert made["said"] == "again"
    assert store.record("book", KEY) == made
    assert content(store.path("book", KEY)) == ["a.txt", "record.json", "x.npy"]
    assert len(list(store.path("book", KEY).parent.iterdir())) == 1


def test_store__failing_fill_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        (folder / "half.txt").write_text("ha")
        raise ZeroDivisionError("midway")

    store = Store(tmp_path)
    with pytest.raises(ZeroDivisionError, match="midway"):
        store.write("book", KEY, fail)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert list(store.path("book", KEY).parent.iterdir()) == []
    assert store.record("book", KEY) is None


@pytest.mark.parametrize("damaged", [False, True])
def test_store__writers_of_one_key_agree(tmp_path: Path, damaged: bool) -> None:
    """Eight at once: one wins, everybody gets a whole artefact, no temporary folder stays."""
    for attempt in range(20):
        store, together = Store(tmp_path / str(attempt)), threading.Barrier(8)
        if damaged:
            store.write("book", KEY, fill_with("old"))
            (store.path("book", KEY) / "a.txt").write_text("")

        def write(number: int, store: Store = store, together: threading.Barrier = together) -> str:
            together.wait()
            return str(store.write("book", KEY, fill_with(f"writer {number}"))["said"])

        with ThreadPoolExecutor(8) as pool:
            said = set(pool.map(write, range(8)))
        record = store.record("book", KEY)
        assert record is not None
        assert (store.path("book", KEY) / "a.txt").read_text() == record["said"]
        assert said <= {f"writer {number}" for number in range(8)}
        assert damaged or said == {record["said"]}
        assert len(list(store.path("book", KEY).parent.iterdir())) == 1


# ---- runs -------------------------------------------------------------------------------------------


def publish_run(out: Path, mark: int) -> None:
    with RunDirectory(out) as run:
        run.write_table("buckets", pd.DataFrame({"mark": [mark]}))
        run.write_run({"mark": mark})
        run.publish()


def test_run_directory__is_published_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    with RunDirectory(out) as run:
        run.write_table("buckets", pd.DataFrame({"mark": [1]}))
        run.write_run({"mark": 1})
        assert not out.exists()
        run.publish()
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
    publish_run(out, 1)
    (out / "results" / "extra.parquet").write_text("of the old run")
    publish_run(out, 2)
    assert json.loads((out / "run.json").read_text()) == {"mark": 2}
    assert content(tmp_path) == ["run", "run/results", "run/results/buckets.parquet", "run/run.json"]


def test_run_directory__a_failing_run_leaves_the_old_one(tmp_path: Path) -> None:
    out = tmp_path / "run"
    publish_run(out, 1)
    before = content(tmp_path)

    def fail() -> None:
        with RunDirectory(out) as run:
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
            RunDirectory(out)
    with pytest.raises(InputError, match=r"notes\.txt is not a folder that can be written to"):
        RunDirectory(tmp_path / "notes.txt" / "run")
    (tmp_path / "empty").mkdir()
    publish_run(tmp_path / "empty", 3)
    assert json.loads((tmp_path / "empty" / "run.json").read_text()) == {"mark": 3}
    assert (tmp_path / "notes.txt").read_text() == "mine"


# ---- the ledger -------------------------------------------------------------------------------------


def _append_many(task: tuple[Path, int]) -> None:
    root, writer = task
    for number in range(25):
        append_ledger(root, {"writer": writer, "number": number, "text": "x" * 5_000, "path": root})


def test_ledger__lines_of_several_processes_are_whole(tmp_path: Path) -> None:
    append_ledger(tmp_path, {"first": True})
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        list(pool.map(_append_many, [(tmp_path, writer) for writer in range(4)]))
    lines = (tmp_path / "logs" / "runs.jsonl").read_text().splitlines()
    first, *rest = (json.loads(line) for line in lines)
    assert first == {"first": True}
    assert len(rest) == 100
    for writer in range(4):
        assert [line["number"] for line in rest if line["writer"] == writer] == list(range(25))
    assert {line["text"] for line in rest} == {"x" * 5_000}
