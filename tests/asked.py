"""What the tests ask of the processes beside them."""

from __future__ import annotations

import os
import signal
import time

from clusterlob_gpu.beside import Each


def numbers(each: Each = map) -> list[tuple[int, int]]:
    """The first squares, and who counted them."""
    return list(each(lambda n: (n * n, os.getpid()), range(6)))


COMMAND = os.getpid()


def in_turn(number: int, each: Each = map) -> tuple[int, bool]:
    """The number, 0 only after a while, and whether it comes from the command itself."""
    time.sleep(0.3 if number == 0 else 0)
    return number, os.getpid() == COMMAND


def asleep(command: int, each: Each = map) -> str:
    """For longer than any test waits, unless done by the command."""
    list(each(lambda _: time.sleep(0 if os.getpid() == command else 600), range(2)))
    return "done"


def dying(how: str, command: int, each: Each = map) -> str:
    """Fails, or kills a process, unless that is the command."""

    def die(_: int) -> None:
        if os.getpid() != command:
            os.kill(os.getpid(), signal.SIGKILL)

    if how == "fails" and os.getpid() != command:
        raise ValueError
    if how == "dies":
        die(0)
    list(each(die, range(2)))
    return "done"
