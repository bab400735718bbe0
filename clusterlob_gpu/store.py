"""Artefacts of days: named by what went into them, whole or absent, made once.

An artefact is a folder `<stage>/<symbol>/<day>/<key>/` with its files and a `record.json`: what it was made
of, what the stage says of it, and size and XXH3 hash of every file.  On a file system it is written under
a hidden name and renamed; in an object store the record is written last.  Either way it is whole once its
record is there; whoever comes second keeps the first, and one whose files do not match is made again.

Workers read artefacts as local files: those of an object store come through a cache in the temporary
folder of the machine.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Literal, Self

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import xxhash
from filelock import FileLock

from clusterlob_gpu.errors import ClusterlobError, InputError
from clusterlob_gpu.files import Location
from clusterlob_gpu.versions import computing_versions

_RECORD = "record.json"
_CACHE_FREE = 0.1
"""Share of the disk that the cache of an object store leaves free."""
_FULL_BYTES = 1 << 20
"""A disk with less room than this is full."""
_VISIBLE_TRIES = 100
"""How often (every 0.1 s) an artefact is looked for that another machine has just put on a shared disk."""
_IN_USE_S = 3600
"""An artefact used within this time (s) is never cleaned away: a run may be reading it."""


def source_hash(caller: str | Path, modules: Iterable[ModuleType | Path]) -> str:
    """Code version of the stages in a file: of its source, of modules and further files that they use, of
    this one, and of the libraries that compute.
    """
    digest = hashlib.sha256(computing_versions().encode())
    files = [module if isinstance(module, Path) else Path(str(module.__file__)) for module in modules]
    for path in (Path(caller), Path(__file__), *files):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def array_hash(array: np.ndarray) -> str:
    """SHA-256 of an array's shape and bytes."""
    return hashlib.sha256(str(array.shape).encode() + np.ascontiguousarray(array).tobytes()).hexdigest()


@dataclass(frozen=True)
class Artefact:
    """What an artefact is made of; its address follows from that alone."""

    stage: str
    symbol: str
    day: str
    inputs: Mapping[str, Any]
    """Plain values: code version, fingerprints of files, addresses of artefacts, settings."""

    @cached_property
    def plain(self) -> dict[str, Any]:
        """The inputs as JSON gives them back."""
        held: dict[str, Any] = json.loads(json.dumps(self.inputs, sort_keys=True, default=str))
        return held

    @cached_property
    def address(self) -> str:
        """Folder below the store: stage, symbol, day, hash of the inputs."""
        text = json.dumps([self.stage, self.symbol, self.day, self.plain], sort_keys=True)
        return f"{self.stage}/{self.symbol}/{self.day}/{hashlib.sha256(text.encode()).hexdigest()[:40]}"


@dataclass(frozen=True)
class Made:
    """An artefact that is there."""

    address: str
    why: str | None
    """Why it had to be made; None where it was there already."""
    size: int
    """Bytes of its files."""
    record: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """What the stage said of it."""

    def brief(self) -> Self:
        """The same without the record: what travels between workers."""
        return replace(self, record={})


class Store:
    """Artefacts below one location."""

    def __init__(self, root: Location | Path | str) -> None:
        self.root = Location.of(root)

    # ---- finding ----------------------------------------------------------------------------------

    def find(self, artefact: Artefact, *, verify: bool = False) -> Made | None:
        """The artefact, None where it is absent or damaged; `verify` reads its files to be sure."""
        held = self._held(artefact.address)
        if held is None:
            return None
        folder = self._local(artefact.address)
        if folder is not None and not _matches(folder, held["files"], verify):
            return None
        return _made(artefact.address, held, None)

    def _held(self, address: str) -> dict[str, Any] | None:
        """Content of a record; None where there is none that can be read."""
        with suppress(FileNotFoundError, NotADirectoryError):
            return _parsed((self.root / address / _RECORD).read())
        return None

    def _local(self, address: str) -> Path | None:
        return None if self.root.path is None else self.root.path / address

    def folder(self, address: str) -> Path:
        """The artefact's files as a local folder, fetched from an object store if they are not here yet."""
        folder = self._local(address)
        if folder is None:
            return self._fetched(address)
        for _ in range(_VISIBLE_TRIES):
            if (folder / _RECORD).exists():
                break
            time.sleep(0.1)
        return folder

    # ---- making -----------------------------------------------------------------------------------

    def make(self, artefact: Artefact, fill: Callable[[Path], Mapping[str, Any]]) -> Made:
        """The artefact, made if it is not there: `fill` writes its files into a folder, gives its record."""
        found = self.find(artefact, verify=True)
        if found is not None:
            self._touch(artefact.address)
            return found
        why = self.why(artefact)
        with self._workplace() as folder:
            record = fill(folder)
            held: dict[str, Any] = {"record": record, "files": _described(folder)}
            held |= {"inputs": artefact.plain, "why": why, "made": time.time()}
            # Read back as every later run will find it.
            text = json.dumps(held, default=str)
            (folder / _RECORD).write_text(text)
            held = self._put(artefact.address, folder, json.loads(text))
        return _made(artefact.address, held, why)

    def why(self, artefact: Artefact) -> str:
        """Why an artefact that was not found has to be made: in what it differs from its like."""
        likes: list[list[str]] = []
        with suppress(OSError):  # others may be writing here; this is but an explanation
            if (self.root / artefact.address).entries():
                return "damaged"
            parent, key = artefact.address.rsplit("/", 1)
            for entry in (self.root / parent).entries():
                held = self._held(f"{parent}/{entry.name}") if entry.is_folder and entry.name != key else None
                if held is not None:
                    likes.append(_differences(held["inputs"], artefact.plain))
        return "; ".join(sorted(likes, key=len)[0]) if likes else "new"

    @contextmanager
    def _workplace(self) -> Iterator[Path]:
        """A hidden folder to write into, removed at the end, on the file system of the final place."""
        base = self.root.path or self._cache
        folder = base / ".making" / uuid.uuid4().hex
        folder.mkdir(parents=True)
        try:
            yield folder
        except OSError as error:
            # NumPy says of a full disk only that it could not write.
            if error.errno is None and shutil.disk_usage(folder).free < _FULL_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(base)) from None
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _put(self, address: str, folder: Path, held: dict[str, Any]) -> dict[str, Any]:
        """Put a finished folder in place, unless a whole artefact stands there; gives what holds now."""
        if self.root.path is None:
            for name in held["files"]:
                (self.root / address / name).put(folder / name)
            (self.root / address / _RECORD).put(folder / _RECORD)
        base = self.root.path or self._cache
        final = base / address
        final.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):
            os.rename(folder, final)
            return held
        # One repair at a time, or the second would remove what the first has just put in place.
        with FileLock(base / ".making" / "repair.lock"):
            present = _read_record(final)
            if present is not None and _matches(final, present["files"], verify=True):
                return present if self.root.path is not None else held
            shutil.rmtree(final, ignore_errors=True)
            try:
                os.rename(folder, final)
            except OSError:
                present = _read_record(final)  # of a writer who found the place just emptied
                if present is None:
                    raise
                return present
        return held

    def _touch(self, address: str) -> None:
        """Note the use, so that cleaning by age spares it; an object store keeps no such note."""
        folder = self._local(address)
        if folder is not None:
            with suppress(OSError):
                os.utime(folder / _RECORD)

    # ---- object stores ----------------------------------------------------------------------------

    @cached_property
    def _cache(self) -> Path:
        name = hashlib.sha256(self.root.name.encode()).hexdigest()[:16]
        mine = Path(tempfile.gettempdir()) / f"clusterlob-{os.getuid()}"
        mine.mkdir(parents=True, exist_ok=True, mode=0o700)
        (mine / name).mkdir(exist_ok=True)
        return mine / name

    def _fetched(self, address: str) -> Path:
        final = self._cache / address
        present = _read_record(final)
        if present is not None:
            if _matches(final, present["files"], verify=False):
                os.utime(final / _RECORD)
                return final
            shutil.rmtree(final, ignore_errors=True)  # whoever tidies temporary folders was here
        held = self._held(address)
        if held is None:
            raise ClusterlobError(f"{self.root / address}: gone from the store; give the same command again")
        _make_room(self._cache)
        with self._workplace() as folder:
            for name in held["files"]:
                (self.root / address / name).fetch(folder / name)
            if not _matches(folder, held["files"], verify=True):
                (self.root / address / _RECORD).remove()
                raise ClusterlobError(f"{self.root / address}: is damaged; give the same command again")
            (folder / _RECORD).write_text(json.dumps(held))
            final.parent.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):  # another task of this machine was first
                os.rename(folder, final)
        return final

    # ---- care -------------------------------------------------------------------------------------

    def check_writable(self) -> None:
        """Raise InputError if the store refuses writes."""
        probe = self.root / f".probe-{uuid.uuid4().hex}"
        try:
            probe.write(b"")
            probe.remove()
        except OSError as error:
            reason = error.strerror or " ".join(str(error).split())
            raise InputError(f"--store {self.root}: cannot be written to ({reason})") from None

    def held(self) -> list[Held]:
        """Every artefact, oldest use first."""
        folders: dict[str, list[tuple[int, int]]] = {}
        whole = set()
        for entry in self.root.entries(below=True):
            parts = entry.name.split("/")
            if entry.is_folder or len(parts) != 5:
                continue
            address = "/".join(parts[:4])
            folders.setdefault(address, []).append((entry.size, entry.changed_ns))
            if parts[4] == _RECORD:
                whole.add(address)
        found = [
            Held(address, sum(size for size, _ in files), max(ns for _, ns in files) / 1e9, address in whole)
            for address, files in folders.items()
        ]
        return sorted(found, key=lambda one: (one.used, one.address))

    def clean(
        self, *, unused_s: float | None = None, max_bytes: int | None = None, dry_run: bool = False
    ) -> list[Held]:
        """Remove artefacts that were not used for `unused_s`, then the longest unused above `max_bytes`.

        What was used within the last hour stays, whatever the limits: a run may be reading it.  Left-overs
        of writers that were killed go too.  Gives what was (or would be) removed.
        """
        now, held = time.time(), self.held()
        total, gone = sum(one.size for one in held), []
        for one in held:
            idle = now - one.used
            too_old = unused_s is not None and idle > unused_s
            too_much = max_bytes is not None and total > max_bytes
            if idle > _IN_USE_S and (too_old or too_much):
                gone.append(one)
                total -= one.size
        if not dry_run:
            for one in gone:
                (self.root / one.address / _RECORD).remove()  # first, so that what is left counts as absent
                (self.root / one.address).remove()
            self._clean_workplaces(now)
        return gone

    def _clean_workplaces(self, now: float) -> None:
        if self.root.path is None:
            return
        for folder in (self.root.path / ".making").glob("*"):
            newest = max((path.stat().st_mtime for path in [folder, *folder.glob("*")]), default=now)
            if folder.is_dir() and now - newest > 24 * _IN_USE_S:
                shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Held:
    """An artefact as the store's listing shows it."""

    address: str
    size: int
    """Bytes."""
    used: float
    """Time of the last use, s since the epoch."""
    whole: bool

    @property
    def stage(self) -> str:
        return self.address.split("/", 1)[0]


def _made(address: str, held: Mapping[str, Any], why: str | None) -> Made:
    return Made(address, why, sum(size for size, _ in held["files"].values()), held["record"])


def _read_record(folder: Path) -> dict[str, Any] | None:
    with suppress(OSError):
        return _parsed((folder / _RECORD).read_bytes())
    return None


def _parsed(content: bytes) -> dict[str, Any] | None:
    """A record; None where the bytes are none."""
    with suppress(ValueError, TypeError):
        held = json.loads(content)
        if isinstance(held, dict) and {"files", "record", "inputs"} <= set(held):
            return held
    return None


def _described(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and hash of every file, by name."""
    return {path.name: (path.stat().st_size, file_hash(path)) for path in sorted(folder.iterdir())}


def _matches(folder: Path, files: Any, verify: bool) -> bool:
    """Whether a folder holds the files of a record, by size, with `verify` by content."""
    try:
        for name, (size, content) in files.items():
            if (folder / name).stat().st_size != size:
                return False
            if verify and file_hash(folder / name) != content:
                return False
    except (OSError, AttributeError, TypeError, ValueError):
        return False
    return True


def file_hash(path: Path) -> str:
    """XXH3 of a file, hexadecimal."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    """In what two trees of plain values differ, in words: `config.window 100 -> 50`, `files changed`."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted({*old, *new}):
            found += _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        return found
    if old == new:
        return []
    texts = [json.dumps(value) for value in (old, new)]
    return [f"{name} {texts[0]} -> {texts[1]}" if max(map(len, texts)) <= 16 else f"{name} changed"]


def _make_room(cache: Path) -> None:
    """Remove what was longest unused from the cache until the disk has some room again."""
    usage = shutil.disk_usage(cache)
    wanted = int(_CACHE_FREE * usage.total) - usage.free
    if wanted <= 0:
        return
    records = sorted((path.stat().st_mtime, path) for path in cache.glob(f"*/*/*/*/{_RECORD}"))
    for used, record in records:
        if wanted <= 0 or time.time() - used < _IN_USE_S:
            return
        wanted -= sum(path.stat().st_size for path in record.parent.iterdir())
        shutil.rmtree(record.parent, ignore_errors=True)


def read_frame(path: Path) -> pd.DataFrame:
    """A small Parquet file, read without threads: those of Arrow may outlive the interpreter and abort it."""
    with pq.ParquetFile(path) as file:
        return file.read(use_threads=False).to_pandas(use_threads=False)


def save_columns(folder: Path, **columns: np.ndarray) -> None:
    """Write arrays as .npy files, which `load_column` maps without copying."""
    for name, values in columns.items():
        np.save(folder / f"{name}.npy", values)


class OpenColumn:
    """An array (f, n) in a file, filled a range of its columns at a time."""

    def __init__(self, file: BinaryIO, kind: np.dtype[Any], shape: tuple[int, int]) -> None:
        self.shape = shape
        self._file, self._kind = file, kind
        self._start = file.tell()

    def __setitem__(self, at: tuple[slice, slice], values: np.ndarray) -> None:
        """Write values (f, m) to `[:, start:stop]`."""
        for row, part in enumerate(np.ascontiguousarray(values, self._kind)):
            self._file.seek(self._start + (row * self.shape[1] + at[1].start) * self._kind.itemsize)
            self._file.write(part.data)


@contextmanager
def open_column(folder: Path, name: str, kind: np.dtype[Any], shape: tuple[int, int]) -> Iterator[OpenColumn]:
    """A new array file, as `save_columns` writes them, to be filled."""
    with (folder / f"{name}.npy").open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        yield OpenColumn(file, kind, shape)


_NPY_HEADER = re.compile(
    r"\{'descr': '(?P<kind>[^']+)', 'fortran_order': (?P<order>True|False), "
    r"'shape': \((?P<shape>[\d, ]*)\), \}"
)


def load_column(folder: Path, name: str) -> np.ndarray:
    """An array written by `save_columns`, mapped from its file.

    The header is read here and not by `numpy.load`, which parses it as Python: in some releases CPython's
    parser fails at random (gh-106905) when several threads use it at once, as the tasks of a run do.
    """
    path = folder / f"{name}.npy"
    with path.open("rb") as file:
        magic = file.read(10)
        header = file.read(int.from_bytes(magic[8:], "little")).decode("latin1")
        start = file.tell()
    found = _NPY_HEADER.fullmatch(header.strip())
    if magic[:8] != b"\x93NUMPY\x01\x00" or found is None:
        raise ClusterlobError(f"{path}: not an array of this store; remove its folder")
    shape = tuple(int(length) for length in found["shape"].split(",") if length.strip())
    if 0 in shape:
        return np.empty(shape, found["kind"])
    order: Literal["C", "F"] = "F" if found["order"] == "True" else "C"
    return np.asarray(np.memmap(path, found["kind"], "c", start, shape, order))
