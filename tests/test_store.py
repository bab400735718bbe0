"""Artefacts that are whole or absent, made once, explained, found damaged, and cleaned away."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import S3

from clusterlob_gpu import bars, kernels
from clusterlob_gpu.errors import ClusterlobError, InputError
from clusterlob_gpu.files import Location
from clusterlob_gpu.store import (
    Artefact,
    Store,
    array_hash,
    load_column,
    open_column,
    save_columns,
    source_hash,
)

HOUR = 3600


def book(**more: Any) -> Artefact:
    """An artefact of a day's book, with other inputs."""
    return Artefact("book", "testex-AAA", "2024-05-01", {"code": "c1", "depth": 5, "files": "f" * 40} | more)


ONE = book()


def fill_with(text: str) -> Callable[[Path], dict[str, Any]]:
    def fill(folder: Path) -> dict[str, Any]:
        (folder / "a.txt").write_text(text)
        save_columns(folder, x=np.arange(5))
        return {"said": text}

    return fill


def never(_: Path) -> dict[str, Any]:
    raise AssertionError("made again")


def kept(store: Store) -> list[str]:
    """Every file below, without the place where they are made."""
    return [e.name for e in store.root.entries(below=True) if not e.is_folder and ".making" not in e.name]


# ---- names ------------------------------------------------------------------------------------------


def test_address__depends_on_every_input_and_not_on_their_order() -> None:
    turned = Artefact(ONE.stage, ONE.symbol, ONE.day, dict(reversed(ONE.inputs.items())))
    assert turned.address == ONE.address
    others = [
        book(depth=6),
        book(code="c2"),
        Artefact("tail", ONE.symbol, ONE.day, ONE.inputs),
        Artefact(ONE.stage, "testex-BBB", ONE.day, ONE.inputs),
        Artefact(ONE.stage, ONE.symbol, "2024-05-02", ONE.inputs),
    ]
    assert len({one.address.rsplit("/", 1)[1] for one in [*others, ONE]}) == 6
    assert ONE.address.startswith("book/testex-AAA/2024-05-01/")


def test_array_hash__knows_shape_and_values() -> None:
    x = np.arange(6.0)
    hashes = {array_hash(x), array_hash(x.reshape(2, 3)), array_hash(x.reshape(3, 2)), array_hash(x + 1)}
    assert len(hashes) == 4
    assert array_hash(np.asfortranarray(x.reshape(2, 3))) == array_hash(x.reshape(2, 3))


def test_source_hash__depends_on_file_and_modules() -> None:
    files = {source_hash(__file__, [kernels]), source_hash(__file__, [bars])}
    assert len(files | {source_hash(str(bars.__file__), [kernels])}) == 3
    assert source_hash(__file__, [kernels]) in files


# ---- artefacts --------------------------------------------------------------------------------------


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store on a file system, and one in a bucket whose cache is empty."""
    if request.param == "folder":
        return Store(tmp_path / "store")
    s3: S3 = request.getfixturevalue("s3")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return Store(s3 / "deep/store")


def test_make__writes_once_and_gives_the_record_back(store: Store) -> None:
    assert store.find(ONE) is None
    made = store.make(ONE, fill_with("first"))
    assert (made.why, dict(made.record), made.address) == ("new", {"said": "first"}, ONE.address)
    folder = store.folder(made.address)
    assert (folder / "a.txt").read_text() == "first"
    np.testing.assert_array_equal(load_column(folder, "x"), np.arange(5))
    again = store.make(ONE, never)
    assert (again.why, again.record, again.size) == (None, made.record, made.size)
    assert made.size == 5 + (folder / "x.npy").stat().st_size
    assert kept(store) == [f"{ONE.address}/{name}" for name in ("a.txt", "record.json", "x.npy")]
    assert Store(store.root).find(ONE, verify=True) == again
    assert store.find(book(depth=6)) is None


def test_make__says_in_what_it_differs_from_its_like(store: Store) -> None:
    store.make(ONE, fill_with("one"))
    assert store.make(book(depth=6), fill_with("two")).why == "depth 5 -> 6"
    assert store.make(book(depth=6, files="e" * 40), fill_with("three")).why == "files changed"
    nested = [book(config={"window": n, "spread": "ticks"}) for n in (50, 100)]
    assert store.make(nested[0], fill_with("four")).why == "config changed"
    assert store.make(nested[1], fill_with("five")).why == "config.window 50 -> 100"
    other_day = Artefact(ONE.stage, ONE.symbol, "2024-05-02", ONE.inputs)
    assert store.make(other_day, fill_with("six")).why == "new"


def test_fill__that_fails_leaves_nothing(store: Store) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        (folder / "half.txt").write_text("ha")
        raise ZeroDivisionError("midway")

    with pytest.raises(ZeroDivisionError, match="midway"):
        store.make(ONE, fail)
    assert kept(store) == []
    assert store.find(ONE) is None


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "file cut off": lambda folder: (folder / "a.txt").write_text("fir"),
    "file of the same length": lambda folder: (folder / "a.txt").write_text("fIrst"),
    "file gone": lambda folder: (folder / "x.npy").unlink(),
    "record gone": lambda folder: (folder / "record.json").unlink(),
    "record cut off": lambda folder: (folder / "record.json").write_text('{"said": "fi'),
    "record empty": lambda folder: (folder / "record.json").write_text(""),
    "record a list": lambda folder: (folder / "record.json").write_text("[1]"),
    "record without files": lambda folder: (folder / "record.json").write_text("{}"),
    "record with odd files": lambda folder: (folder / "record.json").write_text(
        '{"files": [1], "record": {}, "inputs": {}}'
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_make__notices_damage_and_makes_it_good(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path)
    folder = store.folder(store.make(ONE, fill_with("first")).address)
    DAMAGE[damage](folder)
    assert store.find(ONE, verify=True) is None
    made = store.make(ONE, fill_with("again"))
    assert (made.why, made.record["said"]) == ("damaged", "again")
    assert store.make(ONE, never).record == made.record
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "record.json", "x.npy"]
    assert len(list(folder.parent.iterdir())) == 1


def test_object_store__damage_is_noticed_when_fetched(s3: S3, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "one"))
    root = s3 / "store"
    made = Store(root).make(ONE, fill_with("first"))
    (root / made.address / "a.txt").write(b"fIrst")
    assert (Store(root).folder(made.address) / "a.txt").read_text() == "first"  # its own copy is whole
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "two"))
    with pytest.raises(ClusterlobError, match="is damaged; give the same command again"):
        Store(root).folder(made.address)
    assert Store(root).make(ONE, fill_with("again")).why == "damaged"
    assert (Store(root).folder(made.address) / "a.txt").read_text() == "again"


def test_object_store__without_its_record_an_artefact_is_absent(s3: S3) -> None:
    store = Store(s3 / "store")
    made = store.make(ONE, fill_with("first"))
    (store.root / made.address / "record.json").remove()
    assert store.find(ONE) is None
    assert store.make(ONE, fill_with("again")).record["said"] == "again"


@pytest.mark.parametrize("damaged", [False, True])
def test_make__writers_of_one_artefact_agree(tmp_path: Path, damaged: bool) -> None:
    """Eight at once: one wins, everybody gets a whole artefact, no temporary folder stays."""
    for attempt in range(20):
        store, together = Store(tmp_path / str(attempt)), threading.Barrier(8)
        if damaged:
            folder = store.folder(store.make(ONE, fill_with("old")).address)
            (folder / "a.txt").write_text("")

        def write(number: int, store: Store = store, together: threading.Barrier = together) -> str:
            together.wait()
            return str(store.make(ONE, fill_with(f"writer {number}")).record["said"])

        with ThreadPoolExecutor(8) as pool:
            said = set(pool.map(write, range(8)))
        found = store.find(ONE, verify=True)
        assert found is not None
        folder = store.folder(found.address)
        assert (folder / "a.txt").read_text() == found.record["said"]
        assert said <= {f"writer {number}" for number in range(8)}
        assert damaged or said == {found.record["said"]}
        assert len(list(folder.parent.iterdir())) == 1


ARRAYS = {
    "z": np.arange(12, dtype=np.float32).reshape(6, 2),
    "none": np.empty(0, np.int64),
    "no_rows": np.empty((6, 0), np.float32),
    "one": np.array([7], np.int8),
    "turned": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "flags": np.array([True, False]),
    "scalar": np.array(3.5),
    "unsigned": np.arange(5, dtype=np.uint16),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_columns__come_back_as_they_were_written(tmp_path: Path, name: str) -> None:
    array = ARRAYS[name]
    save_columns(tmp_path, **{name: array})
    back = load_column(tmp_path, name)
    np.testing.assert_array_equal(back, array)
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(back, np.load(tmp_path / f"{name}.npy"))


@pytest.mark.parametrize("size", [1, 3, 100])
def test_open_column__is_filled_in_parts(tmp_path: Path, size: int) -> None:
    """The file is the one that `save_columns` writes."""
    whole = np.arange(60, dtype=np.float32).reshape(6, 10)
    with open_column(tmp_path, "z", whole.dtype, whole.shape) as column:
        for start in range(0, 10, size):
            column[:, start : min(10, start + size)] = whole[:, start : start + size]
    save_columns(tmp_path, again=whole)
    assert (tmp_path / "z.npy").read_bytes() == (tmp_path / "again.npy").read_bytes()
    with open_column(tmp_path, "none", whole.dtype, (6, 0)):
        pass
    assert load_column(tmp_path, "none").shape == (6, 0)


def test_columns__are_private_copies_of_the_file(tmp_path: Path) -> None:
    save_columns(tmp_path, z=ARRAYS["z"])
    back = load_column(tmp_path, "z")
    back[0, 0] = 99
    assert load_column(tmp_path, "z")[0, 0] == 0


def test_columns__many_threads_may_load_at_once(tmp_path: Path) -> None:
    """CPython's parser, which numpy.load uses for the header, fails so in some releases."""
    save_columns(tmp_path, **ARRAYS)
    with ThreadPoolExecutor(8) as pool:
        sums = set(pool.map(lambda _: float(load_column(tmp_path, "z").sum()), range(4_000)))
    assert sums == {66.0}


def test_columns__what_is_no_array_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x02\x00 what", b"PK"):
        (tmp_path / "x.npy").write_bytes(content)
        with pytest.raises(ClusterlobError, match=r"x\.npy: not an array of this store"):
            load_column(tmp_path, "x")


# ---- care -------------------------------------------------------------------------------------------


def aged(store: Store, days: int, hours: float) -> Artefact:
    """An artefact whose last use was so long ago."""
    artefact = book(depth=days)
    folder = store.folder(store.make(artefact, fill_with("x" * 1000)).address)
    for path in folder.iterdir():
        os.utime(path, (time.time() - hours * HOUR,) * 2)
    return artefact


def test_clean__by_age_spares_what_was_used(tmp_path: Path) -> None:
    store = Store(tmp_path)
    old, used, young = aged(store, 1, 50), aged(store, 2, 50), aged(store, 3, 10)
    store.make(used, never)
    planned = store.clean(unused_s=24 * HOUR, dry_run=True)
    assert [one.address for one in planned] == [old.address]
    assert store.find(old) is not None
    assert store.clean(unused_s=24 * HOUR) == planned
    assert [store.find(one) is not None for one in (old, used, young)] == [False, True, True]
    assert not (tmp_path / old.address).exists()


def test_clean__by_size_takes_the_longest_unused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = [aged(store, n, 100 - n) for n in range(1, 6)]
    size = store.held()[0].size
    gone = store.clean(max_bytes=int(2.5 * size))
    assert [one.address for one in gone] == [one.address for one in made[:3]]
    assert [one.address for one in store.held()] == [one.address for one in made[3:]]
    assert store.clean(max_bytes=int(2.5 * size)) == []


def test_clean__never_takes_what_a_run_may_be_reading(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.make(ONE, fill_with("now"))
    assert store.clean(unused_s=0, max_bytes=0) == []
    assert store.find(ONE) is not None


def test_clean__takes_the_left_overs_of_killed_writers(tmp_path: Path) -> None:
    store = Store(tmp_path)
    left, busy = tmp_path / ".making" / "left", tmp_path / ".making" / "busy"
    for folder in (left, busy):
        folder.mkdir(parents=True)
        (folder / "half.npy").write_text("ha")
    for path in (left / "half.npy", left):
        os.utime(path, (time.time() - 25 * HOUR,) * 2)
    store.clean()
    assert (left.exists(), busy.exists()) == (False, True)


def test_clean__object_store(s3: S3) -> None:
    """Nothing there is older than an hour; what is kept is counted all the same."""
    store = Store(s3 / "store")
    store.make(ONE, fill_with("x"))
    (one,) = store.held()
    assert (one.address, one.whole, one.stage) == (ONE.address, True, "book")
    assert store.clean(unused_s=0) == []


def test_check_writable__refuses_in_one_line(tmp_path: Path, s3: S3) -> None:
    Store(tmp_path / "deep" / "store").check_writable()
    assert json.dumps([p.name for p in (tmp_path / "deep" / "store").iterdir()]) == "[]"
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--store .*file.*: cannot be written to \(") as caught:
        Store(tmp_path / "file" / "store").check_writable()
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="--store s3://no-such-bucket/x: cannot be written to"):
        Store(Location.of("s3://no-such-bucket/x")).check_writable()
