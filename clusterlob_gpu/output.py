"""What a run leaves behind: its folder, and a line in the ledger.

A run is made in a hidden folder beside `--out` and takes its place when it is whole.  A run that was
killed leaves the hidden folder; the same command finds it there and goes on as the same run, so that the
ledger has one line for both.  Only one process at a time works on an output folder.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import pandas as pd
from filelock import FileLock, Timeout

from clusterlob_gpu.errors import InputError

_ATTEMPT, _PROGRESS = "attempt.json", "progress.json"
RUN_FILE, SEEN_FILE = "run.json", "inputs.json"


@dataclass(frozen=True)
class Attempt:
    """A run in the making, across restarts."""

    id: str
    asked: str
    """Hash of what was asked for."""
    started_at: str
    number: int
    """1 for the first try."""
    host: str
    pid: int

    @classmethod
    def first(cls, asked: str) -> Self:
        """A run that begins now."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        return cls(f"{asked}-{now}", asked, now, 1, socket.gethostname(), os.getpid())

    @classmethod
    def after(cls, held: dict[str, Any]) -> Self:
        """The next try of a run that was cut off."""
        number = int(held["number"]) + 1
        return cls(held["id"], held["asked"], held["started_at"], number, socket.gethostname(), os.getpid())


class RunDirectory:
    """A run's output: made in a hidden sibling folder, put in place whole by `publish`."""

    def __init__(self, out: Path, asked: str) -> None:
        """`asked` is the hash of what was asked for.  Raises InputError where `out` cannot be used."""
        self.out = Path(out).absolute()
        above = next(folder for folder in self.out.parents if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise InputError(f"--out {self.out}: {above} is not a folder that can be written to")
        if (
            self.out.exists()
            and not (self.out / RUN_FILE).exists()
            and (not self.out.is_dir() or any(self.out.iterdir()))
        ):
            raise InputError(f"--out {self.out}: exists and is not a run; choose an empty or new directory")
        self.work = work_folder(self.out)
        self._asked = asked
        self._told = 0.0

    def __enter__(self) -> Self:
        self._lock = _lock(self.out.parent, f".{self.out.name}.lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise InputError(f"--out {self.out}: another process is making this run") from None
        held = _read_json(self.work / _ATTEMPT)
        again = held is not None and held.get("asked") == self._asked
        self.attempt = Attempt.after(held) if held is not None and again else Attempt.first(self._asked)
        self.work.mkdir(parents=True, exist_ok=True)
        _write_json(self.work / _ATTEMPT, vars(self.attempt))
        for path in self.work.iterdir():
            if path.name != _ATTEMPT:
                _remove(path)
        for old in self.out.parent.glob(f".{self.out.name}.*.old"):
            _remove(old)
        (self.work / "results").mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self._lock.release()

    def progress(self, stage: str, done: int, of: int) -> None:
        """Note how far the run is, for `clusterlob info`; at most once a second."""
        now = time.time()
        if now - self._told >= 1:
            self._told = now
            with suppress(OSError):
                _write_json(self.work / _PROGRESS, {"stage": stage, "done": done, "of": of, "at": now})

    def write_table(self, name: str, table: pd.DataFrame) -> None:
        """Write results/<name>.parquet."""
        table.to_parquet(self.work / "results" / f"{name}.parquet", index=False)

    def write_run(self, values: dict[str, Any]) -> None:
        """Write run.json."""
        _write_json(self.work / RUN_FILE, values)

    def write_seen(self, seen: dict[str, Any]) -> None:
        """Write inputs.json, from which `read_seen` tells later what the run was made of."""
        _write_json(self.work / SEEN_FILE, {"asked": self._asked} | seen)

    def publish(self, lines: Iterable[dict[str, Any]]) -> None:
        """Add the run's lines to the ledger, then put the finished folder in place of what stood there."""
        append_ledger(self.out.parent, lines)
        old = self.out.with_name(f".{self.out.name}.{uuid.uuid4().hex[:8]}.old")
        if self.out.exists():
            os.rename(self.out, old)
        os.rename(self.work, self.out)
        for name in (_ATTEMPT, _PROGRESS):
            (self.out / name).unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)


def work_folder(out: Path) -> Path:
    """Hidden folder in which the run of an output folder is made."""
    return out.with_name(f".{out.name}.partial")


def read_seen(out: Path, asked: str) -> dict[str, Any] | None:
    """What the finished run at `out` has seen; None if there is none that was asked for the same."""
    held = _read_json(Path(out) / SEEN_FILE)
    whole = held is not None and (Path(out) / RUN_FILE).exists() and held.pop("asked", None) == asked
    return held if whole else None


def unfinished(out: Path) -> dict[str, Any] | None:
    """The attempt at an output folder that is being made or was cut off, and its progress; None if none."""
    work = work_folder(Path(out).absolute())
    attempt = _read_json(work / _ATTEMPT)
    if attempt is None:
        return None
    lock = _lock(work.parent, f".{Path(out).absolute().name}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        running = True
    else:
        running = False
        lock.release()
    return attempt | {"running": running, "progress": _read_json(work / _PROGRESS)}


def _lock(out_root: Path, name: str, timeout: float = -1) -> FileLock:
    folder = Path(out_root) / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / name, timeout=timeout)


def append_ledger(out_root: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Append lines to logs/runs.jsonl in one write, under a lock, and flush them to disk.

    A line whose id and status stand there is left out: its run was cut off after it was written.
    """
    ledger = Path(out_root) / "logs" / "runs.jsonl"
    with _lock(out_root, ".runs.lock"):
        there = {(line.get("id"), line.get("status")) for line in read_ledger(out_root)}
        new = [line for line in lines if (line["id"], line["status"]) not in there]
        text = "".join(json.dumps(line, default=str) + "\n" for line in new)
        with ledger.open("ab") as file:
            if text and file.tell() and not _ends_line(ledger):
                text = "\n" + text  # of a writer that was killed, or whose disk was full, in mid-line
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())


def _ends_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def read_ledger(out_root: Path) -> list[dict[str, Any]]:
    """Lines of logs/runs.jsonl; what is not a whole line is passed over."""
    ledger, found = Path(out_root) / "logs" / "runs.jsonl", []
    if ledger.exists():
        for line in ledger.read_text(errors="replace").splitlines():
            with suppress(ValueError):
                held = json.loads(line)
                if isinstance(held, dict):
                    found.append(held)
    return found


def _read_json(path: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        held = json.loads(path.read_text())
        return held if isinstance(held, dict) else None
    return None


def _write_json(path: Path, values: dict[str, Any]) -> None:
    staged = path.with_name(f".{path.name}.tmp")
    staged.write_text(json.dumps(values, indent=1, default=str) + "\n")
    os.replace(staged, path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
