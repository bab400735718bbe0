"""A process that draws pictures beside this one.

It is started by a command that will draw, and loads what drawing needs while the command computes.  Asked for
the pictures of a run it forks, so that every core draws some of them.  Without it, or where it fails, the
command draws alone: the files are the same.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clusterlob_gpu.page import Drawing

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


def ask(out: Path) -> Callable[[], list[dict[str, str]] | None]:
    """Have the painter draw the pictures of the run at `out`; what is given waits for it.

    It gives the fields of the pictures, None where they have not been drawn.
    """
    process = _beside[-1] if _beside else None
    if process is not None:
        with suppress(OSError, ValueError):  # of one that has died
            print(json.dumps(str(out)), file=process.stdin, flush=True)
    return partial(_painted, process, out)


def _painted(process: subprocess.Popen[str] | None, out: Path) -> list[dict[str, str]] | None:
    if process is None:
        return None
    assert process.stdout is not None
    with suppress(OSError, ValueError):
        while (answer := json.loads(process.stdout.readline()))["out"] != str(out):
            pass  # of a run whose pictures nobody has waited for
        found: list[dict[str, str]] | None = answer["drawn"]
        return found
    return None


# ---- the painter's side -----------------------------------------------------------------------------


def main() -> None:
    """Draw the runs whose folders come on standard input, until its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the command's matter, which ends this one
    os.nice(10)  # what the command computes comes first: there is time until it draws
    gc.disable()  # it would touch, and so copy, the memory that those that are forked share
    from clusterlob_gpu import flow_pictures, page, pictures, report, sweep_pictures  # noqa: F401

    page.png(pictures.frame("", "", 1.0))  # loads fonts and what else is loaded late
    for line in sys.stdin:
        out = Path(json.loads(line))
        drawings = report.drawings(out)
        drawn = [{"symbol": one.symbol, "name": one.name, "caption": one.caption} for one in drawings]
        answer = {"out": str(out), "drawn": drawn if _drawn(drawings, out) else None}
        print(json.dumps(answer), flush=True)


def _drawn(drawings: Sequence[Drawing], out: Path) -> bool:
    """Draw by one process per core, each the next of the drawings; gives whether none failed."""
    numbers, left = os.pipe()
    hands = [_forked(drawings, out, numbers, left) for _ in range(min(_cores(), len(drawings)))]
    os.close(numbers)
    with open(left, "wb") as into, suppress(BrokenPipeError):
        into.writelines(number.to_bytes(4) for number in range(len(drawings)))
    ended = [os.waitpid(hand, 0)[1] for hand in hands]
    return not any(ended)


def _forked(drawings: Sequence[Drawing], out: Path, numbers: int, left: int) -> int:
    """A process that draws, by the numbers that it reads, four bytes each."""
    hand = os.fork()
    if hand:
        return hand
    try:
        os.close(left)
        while number := os.read(numbers, 4):
            drawings[int.from_bytes(number)].draw(out)
        os._exit(0)
    finally:
        os._exit(1)


if __name__ == "__main__":
    main()
