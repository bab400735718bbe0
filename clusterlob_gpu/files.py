"""Files and folders by one name, on a local or shared file system or in an S3-compatible store.

A lake and a store may lie at a path or at `s3://bucket/prefix`.  Keys, region and endpoint of S3 come from
the environment, as all its tools read them (AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL, ...).

What cannot be reached (no permission, no connection, a disk's error) is an OSError of one line with the
address; `parquet_faults` tells it from a file whose content is broken, which is a LakeError.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs

from clusterlob_gpu.errors import InputError, LakeError

_S3 = "s3://"


class Entry(NamedTuple):
    """A file or folder as a listing shows it."""

    name: str
    """Relative to what was listed."""
    is_folder: bool
    size: int
    """Bytes; 0 for a folder."""
    changed_ns: int
    """Time of the last change, ns since the epoch; 0 where unknown."""


@dataclass(frozen=True)
class Location:
    """A file or folder that may or may not exist: an absolute path, or `s3://bucket/key`."""

    name: str

    @classmethod
    def of(cls, where: str | Path | Location) -> Location:
        """The location of a path (made absolute) or an s3:// address; raises InputError for other schemes."""
        if isinstance(where, Location):
            return where
        text = str(where)
        if text.startswith(_S3):
            return cls(text.rstrip("/"))
        if "://" in text:
            raise InputError(f"{text}: must be a path or s3://bucket/prefix")
        return cls(str(Path(text).absolute()))

    def __str__(self) -> str:
        return self.name

    def __truediv__(self, part: str) -> Location:
        return Location(f"{self.name.rstrip('/')}/{part}")

    @property
    def path(self) -> Path | None:
        """The path of a local or shared file system; None for an object store."""
        return None if self.name.startswith(_S3) else Path(self.name)

    @property
    def last(self) -> str:
        """Last part of the name."""
        return self.name.rsplit("/", 1)[-1]

    @contextmanager
    def _system(self) -> Iterator[tuple[pafs.FileSystem, str]]:
        """The file system and the name in it; its errors get one line with this address."""
        try:
            if self.path is not None:
                yield pafs.LocalFileSystem(), self.name
            else:
                yield _object_store(_endpoint()), self.name.removeprefix(_S3)
        except OSError as error:
            raise _unreachable(error, self) from None

    def entry(self) -> Entry | None:
        """What lies here; None where nothing does."""
        with self._system() as (system, name):
            info = system.get_file_info(name)
        return None if info.type == pafs.FileType.NotFound else _entry(info, self.last)

    def entries(self, *, below: bool = False) -> list[Entry]:
        """What the folder holds, sorted by name, with `below` all levels; none if it is absent."""
        with self._system() as (system, name):
            found = system.get_file_info(pafs.FileSelector(name, allow_not_found=True, recursive=below))
        start = len(name) + 1
        return sorted(_entry(info, info.path[start:]) for info in found if info.path != name)

    def open(self) -> pa.NativeFile:
        """The file, open for reading at any place."""
        with self._system() as (system, name):
            return system.open_input_file(name)

    def state(self, file: pa.NativeFile) -> str:
        """Tells the content of the file, as `open` gave it, from what lay here before or will after."""
        if self.path is None:
            return str(file.metadata().get("ETag"))
        stat = self.path.stat()
        return f"{stat.st_size} {stat.st_mtime_ns}"

    def read(self) -> bytes:
        """Content of the file."""
        with self._system() as (system, name), system.open_input_file(name) as file:
            return bytes(file.read())

    def write(self, content: bytes) -> None:
        """Write the file so that it is whole or absent; an older one is replaced."""
        if self.path is None:
            with self._system() as (system, name), system.open_output_stream(name) as file:
                file.write(content)
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        staged = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        staged.write_bytes(content)
        os.replace(staged, self.path)

    def fetch(self, target: Path) -> None:
        """Copy the file to a local one."""
        with (
            self._system() as (system, name),
            system.open_input_stream(name) as source,
            target.open("wb") as into,
        ):
            shutil.copyfileobj(source, into, 1 << 22)

    def put(self, source: Path) -> None:
        """Copy a local file here."""
        with (
            source.open("rb") as file,
            self._system() as (system, name),
            system.open_output_stream(name) as into,
        ):
            shutil.copyfileobj(file, into, 1 << 22)

    def remove(self) -> None:
        """Remove the file, or the folder with all that it holds, if it is there."""
        if self.path is not None:
            shutil.rmtree(self.path) if self.path.is_dir() else self.path.unlink(missing_ok=True)
            return
        found = self.entry()
        if found is not None:
            with self._system() as (system, name):
                system.delete_dir(name) if found.is_folder else system.delete_file(name)


@contextmanager
def parquet_faults(where: Location) -> Iterator[None]:
    """While a Parquet file is decoded: LakeError if its content is broken, OSError if it cannot be reached.

    Arrow raises OSError for both; but only the system's own errors have an errno, and those of S3 say
    "AWS Error".  Memory that runs out is nobody's fault and stays a MemoryError.
    """
    try:
        yield
    except MemoryError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and (error.errno is not None or "AWS Error" in str(error)):
            raise _unreachable(error, where) from None
        raise LakeError(f"{where}: not a readable Parquet file ({_line(error)}); ingest it again") from None


def _unreachable(error: OSError, where: Location) -> OSError:
    """The error as one line that names the file; unchanged if it names one already."""
    if error.filename is not None:
        return error
    if error.errno is None:
        return OSError(errno.EIO, _line(error), str(where))
    return OSError(error.errno, os.strerror(error.errno), str(where))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _entry(info: pafs.FileInfo, name: str) -> Entry:
    return Entry(name, info.type == pafs.FileType.Directory, info.size or 0, info.mtime_ns or 0)


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


@lru_cache(maxsize=4)
def _object_store(endpoint: str | None) -> pafs.FileSystem:
    # Small files in one request, and errors where they happen: none of the threads of background writes.
    # Four attempts outlast a store that asks many workers to slow down; no connection fails in seconds.
    return pafs.S3FileSystem(
        endpoint_override=endpoint,
        allow_delayed_open=True,
        background_writes=False,
        connect_timeout=5,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=4),
    )
