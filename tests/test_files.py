"""Files by one name on a disk and in S3: what is written is read, and an error names its file."""

from __future__ import annotations

import errno
import pickle
import time
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import S3

from clusterlob_gpu.errors import InputError, LakeError
from clusterlob_gpu.files import Location, parquet_faults


@pytest.fixture(params=["disk", "s3"])
def here(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """An empty folder of either kind."""
    if request.param == "disk":
        return Location.of(tmp_path / "a b")
    s3: S3 = request.getfixturevalue("s3")
    return s3 / "a b"


def test_of__paths_and_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Location.of("x/y") == Location.of(tmp_path / "x" / "y") == Location(f"{tmp_path}/x/y")
    assert Location.of("s3://bucket/lake/") == Location("s3://bucket/lake")
    assert Location.of(Location("s3://b/k")) == Location("s3://b/k")
    assert (Location.of("x").path, Location.of("s3://b/k").path) == (tmp_path / "x", None)
    assert str(Location.of("s3://b") / "k" / "file") == "s3://b/k/file"
    assert (Location.of("s3://b/k") / "file").last == "file"
    with pytest.raises(InputError, match="gs://b/k: must be a path or s3://bucket/prefix"):
        Location.of("gs://b/k")


def test_content__comes_back(here: Location, tmp_path: Path) -> None:
    file = here / "deep" / "er" / "file=1.bin"
    file.write(b"first")
    file.write(b"second")
    assert file.read() == b"second"
    with file.open() as opened:
        assert opened.read_at(3, 2) == b"con"
    file.fetch(tmp_path / "copy")
    (here / "again").put(tmp_path / "copy")
    assert (here / "again").read() == b"second"
    assert pickle.loads(pickle.dumps(file)).read() == b"second"


def test_entries__are_sorted_and_relative(here: Location) -> None:
    assert here.entries() == []
    assert here.entry() is None
    before = time.time_ns() - 2_000_000_000
    for name in ("b", "a/x", "a/c/y"):
        (here / name).write(b"123")
    found = here.entries()
    assert [(e.name, e.is_folder, e.size) for e in found] == [("a", True, 0), ("b", False, 3)]
    assert before < found[1].changed_ns < time.time_ns() + 2_000_000_000
    assert {e.name for e in here.entries(below=True) if not e.is_folder} == {"a/x", "a/c/y", "b"}
    file, folder, nothing = (here / "b").entry(), (here / "a").entry(), (here / "c").entry()
    assert file == found[1]
    assert folder is not None
    assert (folder.is_folder, nothing) == (True, None)


def test_remove__files_folders_and_nothing(here: Location) -> None:
    for name in ("b", "a/x", "a/c/y"):
        (here / name).write(b"123")
    for name in ("a", "nothing"):
        (here / name).remove()
    assert [e.name for e in here.entries()] == ["b"]
    (here / "b").remove()
    assert here.entries() == []


def test_state__tells_another_content(here: Location) -> None:
    file, states = here / "file", []
    for content in (b"one", b"one", b"two"):
        file.write(content)
        with file.open() as opened:
            states.append(file.state(opened))
    assert states[1] != states[2]
    with file.open() as opened:
        assert file.state(opened) == states[2]


def test_error__of_a_missing_file_names_it(here: Location) -> None:
    for act in (here.open, here.read):
        with pytest.raises(FileNotFoundError) as caught:
            act()
        assert str(caught.value) == f"[Errno 2] No such file or directory: '{here}'"


def test_error__of_another_file_keeps_its_name(here: Location, tmp_path: Path) -> None:
    here.write(b"x")
    with pytest.raises(IsADirectoryError) as caught:
        here.fetch(tmp_path)
    assert caught.value.filename == str(tmp_path)


def test_error__folder_in_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=f"is a directory: '{tmp_path}'") as caught:
        Location.of(tmp_path).read()
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("act", ["entry", "entries", "open", "read"])
def test_error__no_permission(s3: S3, act: str) -> None:
    s3.server.spoil = lambda _: "403 Forbidden"
    with pytest.raises(OSError, match=r"AWS Error ACCESS_DENIED.*'s3://.*/x'"):
        getattr(s3 / "x", act)()


@pytest.mark.parametrize(
    "error",
    [
        pa.ArrowInvalid("Parquet magic\nbytes not found"),
        pa.ArrowNotImplementedError("Integers with more than 64 bits"),
        OSError("ZSTD decompression failed"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    ],
)
def test_parquet_faults__of_content(error: Exception) -> None:
    text = r"/x: not a readable Parquet file \(.*\); ingest it again"
    with pytest.raises(LakeError, match=text), parquet_faults(Location("/x")):
        raise error


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ENOENT, errno.ESTALE, errno.ETIMEDOUT])
def test_parquet_faults__of_the_system(number: int) -> None:
    with pytest.raises(OSError, match="'/x'") as caught, parquet_faults(Location("/x")):
        raise OSError(number, "Error reading bytes from file")
    assert caught.value.errno == number
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args


def test_parquet_faults__of_s3_and_memory() -> None:
    text = "AWS Error NETWORK_CONNECTION: 's3://b/x'"
    with pytest.raises(OSError, match=text), parquet_faults(Location("s3://b/x")):
        raise OSError("When reading: AWS Error NETWORK_CONNECTION")
    with pytest.raises(MemoryError), parquet_faults(Location("/x")):
        raise pa.ArrowMemoryError("malloc of size 5 failed")
