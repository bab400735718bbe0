"""A process that draws pictures beside this one.

It is started by a command that will draw, and loads what drawing needs while the command computes.  Asked for
the pictures of a run it forks, so that every core draws some of them.  Without it, or where it fails, the
command draws alone: the files are the same.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clusterlob_gpu.page import Picture

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
    # A group of its own, with which those that it forks are ended too.
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nowhere, text=True, process_group=0)
    _beside.append(process)
    try:
        yield
    finally:
        _beside.remove(process)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()  # closes the pipes and waits, also where it had died before


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share(out: Path, count: int, draw: Callable[[int], None]) -> None:
    """Have the pictures 0 to count - 1 of the run at `out` drawn, by the painter or else here by `draw`."""
    if not (_beside and _asked(_beside[-1], out, count)):
        for number in range(count):
            draw(number)


def _asked(process: subprocess.Popen[str], out: Path, count: int) -> bool:
    """Whether the painter has drawn what it was asked for."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(OSError):
        print(json.dumps([str(out), count]), file=process.stdin, flush=True)
        return process.stdout.readline() == "drawn\n"
    return False


# ---- the painter's side -----------------------------------------------------------------------------


def main() -> None:
    """Draw what is asked for on standard input, until its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the command's matter, which ends this one
    from clusterlob_gpu import flow_pictures, page, pictures, report, sweep_pictures  # noqa: F401

    page.png(pictures.frame("", "", 1.0))  # loads fonts and what else is loaded late
    for line in sys.stdin:
        out, count = json.loads(line)
        wanted = report.pictures_of(Path(out))
        drawn = len(wanted) == count and _drawn(wanted, Path(out))
        print("drawn" if drawn else "failed", flush=True)


def _drawn(pictures: Sequence[Picture], out: Path) -> bool:
    """Draw by one process per core, each the next of the pictures; gives whether none failed."""
    numbers, left = os.pipe()
    hands = [_forked(pictures, out, numbers, left) for _ in range(min(_cores(), len(pictures)))]
    os.close(numbers)
    with open(left, "wb") as into, suppress(BrokenPipeError):
        into.writelines(number.to_bytes(4) for number in range(len(pictures)))
    ended = [os.waitpid(hand, 0)[1] for hand in hands]
    return not any(ended)


def _forked(pictures: Sequence[Picture], out: Path, numbers: int, left: int) -> int:
    """A process that draws pictures by the numbers that it reads, four bytes each."""
    hand = os.fork()
    if hand:
        return hand
    try:
        os.close(left)
        while number := os.read(numbers, 4):
            pictures[int.from_bytes(number)].draw(out)
        os._exit(0)
    finally:
        os._exit(1)


if __name__ == "__main__":
    main()
