"""Files and folders by one name, on a local or shared file system or in an S3-compatible store.

A lake and a store may lie at a path or at `s3://bucket/prefix`.  Keys, region and endpoint of S3 come from
the environment, as all its tools read them (AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL, ...).
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs

from clusterlob_gpu.errors import InputError

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
        """The location of a path (made absolute) or of an s3:// address; raises InputError for other schemes."""
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

    @property
    def _system(self) -> tuple[pafs.FileSystem, str]:
        if self.path is not None:
            return pafs.LocalFileSystem(), self.name
        return _object_store(_endpoint()), self.name.removeprefix(_S3)

    def entry(self) -> Entry | None:
        """What lies here; None where nothing does."""
        system, name = self._system
        info = system.get_file_info(name)
        return None if info.type == pafs.FileType.NotFound else _entry(info, self.last)

    def entries(self, *, below: bool = False) -> list[Entry]:
        """What the folder holds, sorted by name, with `below` all levels; none if it is absent."""
        system, name = self._system
        found = system.get_file_info(pafs.FileSelector(name, allow_not_found=True, recursive=below))
        start = len(name) + 1
        return sorted(_entry(info, info.path[start:]) for info in found if info.path != name)

    def open(self) -> pa.NativeFile:
        """The file, open for reading at any place."""
        system, name = self._system
        return system.open_input_file(name)

    def read(self) -> bytes:
        """Content of the file."""
        with self.open() as file:
            return bytes(file.read())

    def write(self, content: bytes) -> None:
        """Write the file so that it is whole or absent; an older one is replaced."""
        if self.path is None:
            system, name = self._system
            with system.open_output_stream(name) as file:
                file.write(content)
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        staged = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        staged.write_bytes(content)
        os.replace(staged, self.path)

    def fetch(self, target: Path) -> None:
        """Copy the file to a local one."""
        system, name = self._system
        with system.open_input_stream(name) as source, target.open("wb") as into:
            shutil.copyfileobj(source, into, 1 << 22)

    def put(self, source: Path) -> None:
        """Copy a local file here."""
        system, name = self._system
        with source.open("rb") as file, system.open_output_stream(name) as into:
            shutil.copyfileobj(file, into, 1 << 22)

    def remove(self) -> None:
        """Remove the file, or the folder with all that it holds, if it is there."""
        if self.path is not None:
            shutil.rmtree(self.path) if self.path.is_dir() else self.path.unlink(missing_ok=True)
            return
        found, (system, name) = self.entry(), self._system
        if found is not None:
            system.delete_dir(name) if found.is_folder else system.delete_file(name)


def _entry(info: pafs.FileInfo, name: str) -> Entry:
    return Entry(name, info.type == pafs.FileType.Directory, info.size or 0, info.mtime_ns or 0)


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


@lru_cache(maxsize=4)
def _object_store(endpoint: str | None) -> pafs.FileSystem:
    # Small files in one request, and errors where they happen: none of the threads of background writes.
    return pafs.S3FileSystem(endpoint_override=endpoint, allow_delayed_open=True, background_writes=False)
