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
from clusterlob_gpu.store import file_hash

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
        self._told_at = 0.0
        self.told = False
        """Whether the ledger has the run's last line."""

    def __enter__(self) -> Self:
        # A second's patience: `unfinished` holds the lock for a moment.
        self._lock = _lock(self.out.parent, f".{self.out.name}.lock", timeout=1)
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
            if self.out.exists():
                _remove(old)
            else:  # of a process that was killed between the two renames of `publish`
                os.rename(old, self.out)
        (self.work / "results").mkdir()
        return self

    def clear_results(self) -> None:
        """Drop what an earlier try within this process has written."""
        _remove(self.work / "results")
        (self.work / "results").mkdir()

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self._lock.release()

    def progress(self, stage: str, done: int, of: int) -> None:
        """Note how far the run is, for `clusterlob info`; at most once a second."""
        now = time.time()
        if now - self._told_at >= 1:
            self._told_at = now
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
        kept = [self.work / "model.json", *sorted((self.work / "results").rglob("*"))]
        files = {
            str(path.relative_to(self.work)): [path.stat().st_size, file_hash(path)]
            for path in kept
            if path.is_file()
        }
        _write_json(self.work / SEEN_FILE, {"asked": self._asked, "files": files} | seen)

    def publish(self, lines: Iterable[dict[str, Any]]) -> None:
        """Add the run's lines to the ledger, then put the finished folder in place of what stood there."""
        append_ledger(self.out.parent, lines)
        self.told = True
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
    """What the finished run at `out` has seen.

    None if there is none that was asked for the same, or if its results are no longer what it wrote.
    """
    held = _read_json(Path(out) / SEEN_FILE)
    if held is None or not (Path(out) / RUN_FILE).exists() or held.pop("asked", None) != asked:
        return None
    for name, (size, content) in held.pop("files", {}).items():
        path = Path(out) / name
        if not path.is_file() or path.stat().st_size != size or file_hash(path) != content:
            return None
    return held


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
    """Append lines to logs/runs.jsonl in one write, under a lock.

    A line that stands there, but for its seconds and attempts, is left out: its run was cut off after it
    was written.
    """
    ledger = Path(out_root) / "logs" / "runs.jsonl"
    with _lock(out_root, ".runs.lock"):
        there = {_told(line) for line in read_ledger(out_root)}
        texts = [json.dumps(line, default=str) for line in lines]
        text = "".join(text + "\n" for text in texts if _told(json.loads(text)) not in there)
        with ledger.open("ab") as file:
            if text and file.tell() and not _ends_line(ledger):
                text = "\n" + text  # of a writer that was killed, or whose disk was full, in mid-line
            file.write(text.encode())


def _told(line: dict[str, Any]) -> str:
    """What a line says, whenever and at whichever try it was said."""
    kept = {name: value for name, value in line.items() if name not in ("seconds", "attempts")}
    return json.dumps(kept, sort_keys=True)


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
