"""What a run leaves behind: artefacts of days, the run directory, and the ledger of runs.

An artefact is a directory named by the hash of everything that went into it.  It is written under a
temporary name and renamed, so it is either whole or absent; whoever comes second keeps the first.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
from filelock import FileLock

from clusterlob_gpu.errors import InputError

_RECORD = "record.json"


def source_hash(caller: str, modules: Iterable[ModuleType]) -> str:
    """Hash of the source of a file and of modules: the code version of the stages that use them."""
    digest = hashlib.sha256(Path(caller).read_bytes())
    for module in modules:
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()


def artefact_key(**parts: Any) -> str:
    """Name of an artefact: SHA-256 of the canonical JSON of what goes into it."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:40]


def array_hash(array: np.ndarray) -> str:
    """SHA-256 of an array's shape and bytes."""
    return hashlib.sha256(str(array.shape).encode() + np.ascontiguousarray(array).tobytes()).hexdigest()


class Store:
    """Artefacts by stage and key below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def path(self, stage: str, key: str) -> Path:
        """Directory of an artefact, whether it exists or not."""
        return self.root / stage / key[:2] / key

    def record(self, stage: str, key: str) -> dict[str, Any] | None:
        """The artefact's record, or None where it is absent or any of its files is damaged."""
        folder = self.path(stage, key)
        try:
            record = json.loads((folder / _RECORD).read_text())
            whole = all((folder / name).stat().st_size == size for name, size in record["files"].items())
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return None
        return record if whole else None

    def reuse_or_write(
        self, stage: str, key: str, fill: Callable[[Path], dict[str, Any]]
    ) -> tuple[dict[str, Any], bool]:
        """The artefact's record, and whether it was there already; see `write` for `fill`."""
        present = self.record(stage, key)
        return (self.write(stage, key, fill), False) if present is None else (present, True)

    def write(self, stage: str, key: str, fill: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """Make an artefact: `fill` writes its files into a folder and returns its record."""
        final = self.path(stage, key)
        final.parent.mkdir(parents=True, exist_ok=True)
        folder = final.with_name(f".{key}.{uuid.uuid4().hex}")
        folder.mkdir()
        try:
            record = fill(folder)
            record["files"] = {entry.name: entry.stat().st_size for entry in sorted(folder.iterdir())}
            (folder / _RECORD).write_text(json.dumps(record))
            return self._commit(folder, final, record)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _commit(self, folder: Path, final: Path, record: dict[str, Any]) -> dict[str, Any]:
        """Rename into place; a whole artefact that stands there is kept, a damaged one replaced."""
        with suppress(OSError):
            os.rename(folder, final)
            return record
        stage, key = final.parent.parent.name, final.name
        # One repair at a time, or the second would remove what the first has just put in place.
        with FileLock(self.root / ".repair.lock"):
            present = self.record(stage, key)
            if present is not None:
                return present
            shutil.rmtree(final, ignore_errors=True)
            try:
                os.rename(folder, final)
            except OSError:
                present = self.record(stage, key)  # of a writer who found the place just emptied
                if present is None:
                    raise
                return present
        return record


def save_columns(folder: Path, **columns: np.ndarray) -> None:
    """Write arrays as .npy files, which `load_column` maps without copying."""
    for name, values in columns.items():
        np.save(folder / f"{name}.npy", values)


def load_column(folder: Path, name: str) -> np.ndarray:
    """An array written by `save_columns`, mapped from its file."""
    mapped = np.load(folder / f"{name}.npy", mmap_mode="c")
    return np.asarray(mapped)


class RunDirectory:
    """A run's output: made in a hidden sibling folder, put in place whole by `publish`."""

    def __init__(self, out: Path) -> None:
        self.out = Path(out).absolute()
        above = next(folder for folder in self.out.parents if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise InputError(f"--out {self.out}: {above} is not a folder that can be written to")
        if (
            self.out.exists()
            and not (self.out / "run.json").exists()
            and (not self.out.is_dir() or any(self.out.iterdir()))
        ):
            raise InputError(f"--out {self.out}: exists and is not a run; choose an empty or new directory")
        self.work = self.out.with_name(f".{self.out.name}.{uuid.uuid4().hex[:8]}.partial")

    def __enter__(self) -> RunDirectory:
        (self.work / "results").mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.work, ignore_errors=True)

    def write_table(self, name: str, table: pd.DataFrame) -> None:
        """Write results/<name>.parquet."""
        table.to_parquet(self.work / "results" / f"{name}.parquet", index=False)

    def write_run(self, values: dict[str, Any]) -> None:
        """Write run.json."""
        (self.work / "run.json").write_text(json.dumps(values, indent=1, default=str) + "\n")

    def publish(self) -> None:
        """Put the finished directory in place of whatever run stood there."""
        old = self.out.with_name(f".{self.out.name}.{uuid.uuid4().hex[:8]}.old")
        with _logs_lock(self.out.parent):
            if self.out.exists():
                os.rename(self.out, old)
            os.rename(self.work, self.out)
        shutil.rmtree(old, ignore_errors=True)


def _logs_lock(out_root: Path) -> FileLock:
    """Lock of everything that runs with one out root share: the ledger, the moment of publishing."""
    folder = Path(out_root) / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / ".runs.lock")


def append_ledger(out_root: Path, line: dict[str, Any]) -> None:
    """Append one line to logs/runs.jsonl in one write, under a lock, and flush it to disk."""
    text = json.dumps(line, default=str) + "\n"
    lock = _logs_lock(out_root)
    with lock, (Path(out_root) / "logs" / "runs.jsonl").open("a") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
