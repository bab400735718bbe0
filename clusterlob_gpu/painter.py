"""A second process that draws pictures beside this one.

It is started by a command that will draw, loads what drawing needs while the command computes, and then takes
pictures off the front of the list while the command takes them off its end.  Without it, or where it has
died, the command draws alone: the files are the same.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from threading import Thread

_beside: list[subprocess.Popen[str]] = []
"""The painter of this process, while there is one."""


@contextmanager
def painting() -> Iterator[None]:
    """Have a painter ready for the pictures drawn in this block, where there is a core for it."""
    if _cores() < 2:
        yield
        return
    command = [sys.executable, "-P", "-m", "clusterlob_gpu.painter"]
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nowhere, text=True)
    _beside.append(process)
    try:
        yield
    finally:
        _beside.remove(process)
        process.kill()
        process.communicate()  # closes the pipes and waits, also where it had died before


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share(out: Path, count: int, draw: Callable[[int], None]) -> None:
    """Draw the pictures 0 to count - 1 of the run at `out`, here by `draw` and beside by the painter."""
    left, failed = deque(range(count)), deque[int]()
    hand = Thread(target=_hand_over, args=(_beside[-1], out, left, failed)) if _beside else None
    if hand is not None:
        hand.start()
    try:
        for number in _until_empty(left.pop):
            draw(number)
    finally:
        left.clear()
        if hand is not None:
            hand.join()
    for number in failed:
        draw(number)


def _until_empty(take: Callable[[], int]) -> Iterator[int]:
    """What is left of a list from which another thread takes as well."""
    while True:
        try:
            number = take()
        except IndexError:
            return
        yield number


def _hand_over(process: subprocess.Popen[str], out: Path, left: deque[int], failed: deque[int]) -> None:
    """Ask the painter for one picture after the other, until none is left or it fails."""
    assert process.stdin is not None
    assert process.stdout is not None
    for number in _until_empty(left.popleft):
        with suppress(OSError):
            print(json.dumps([str(out), number]), file=process.stdin, flush=True)
            if process.stdout.readline() == "drawn\n":
                continue
        failed.append(number)
        return


def main() -> None:
    """Draw what is asked for on standard input, until its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the command's matter, which ends this one
    from clusterlob_gpu import flow_pictures, page, pictures, report, sweep_pictures  # noqa: F401

    page.png(pictures.frame("", "", 1.0))  # loads fonts and what else is loaded late
    pictures_of = lru_cache(maxsize=1)(report.pictures_of)
    for line in sys.stdin:
        out, number = json.loads(line)
        pictures_of(Path(out))[number].draw(Path(out))
        print("drawn", flush=True)


if __name__ == "__main__":
    main()
