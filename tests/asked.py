"""What the tests ask of the processes beside them."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from clusterlob_gpu.beside import Each


def numbers(each: Each = map) -> list[tuple[int, int]]:
    """The first squares, and who counted them."""
    return list(each(lambda n: (n * n, os.getpid()), range(6)))


def in_turn(number: int, each: Each = map) -> int:
    time.sleep(0.3 if number == 0 else 0)
    return number


def failing(each: Each = map) -> None:
    raise ValueError


def dying(how: str, each: Each = map) -> Any:
    def die(_: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    return die(0) if how == "itself" else each(die, range(2))
