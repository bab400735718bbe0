"""Processes beside this one, for what Python's lock would hold up: tables of statistics, and pictures.

A command that will want them forks them before it loads Numba, so that they share what both need.  Each thing
asked of them is done in a process that is forked for it, and may be spread over more; each dies with the one
that forked it.  Without them, or where they fail, the command does it alone: the results are the same.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any, Literal, NoReturn, Protocol, TypeVar

from clusterlob_gpu import cores

Item = TypeVar("Item")
Result = TypeVar("Result")
Kind = Literal["tables", "pictures"]

_KINDS: dict[Kind, Callable[[], None]] = {}
"""What a process of that kind does before it is asked anything."""
_lines: dict[Kind, socket.socket] = {}
"""Where they are asked, while they are there."""

_PR_SET_PDEATHSIG = 1

log = logging.getLogger(__name__)


class Each(Protocol):
    """Applies a function to every item; gives the results in order."""

    def __call__(self, function: Callable[[Item], Result], items: Iterable[Item], /) -> Iterable[Result]: ...


@contextmanager
def helpers() -> Iterator[None]:
    """Have processes beside this one during the block, where there is a core for them.

    There are none either where this process has threads of Python, which a fork would not have, where the
    system has no room for them, and outside Linux, where libraries may not be used after a fork.
    """
    if sys.platform != "linux" or cores.available() < 2 or threading.active_count() > 1:
        yield
        return
    import_module("clusterlob_gpu.flow_evaluation")
    begun: list[int] = []
    try:
        with suppress(OSError):
            for kind in _KINDS:
                _begin(kind, begun)
        yield
    finally:
        while _lines:
            _lines.popitem()[1].close()
        for process in begun:
            with suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
            with suppress(ChildProcessError):  # where nobody is told of children that end
                os.waitpid(process, 0)


def _begin(kind: Kind, begun: list[int]) -> None:
    """Fork a process of that kind."""
    ours, theirs = socket.socketpair()
    with theirs, ExitStack() as failing:
        failing.enter_context(ours)
        command = os.getpid()
        process = os.fork()
        if not process:
            _help(command, kind, theirs, [ours, *_lines.values()])
        begun.append(process)
        # A group of its own, with which those that it forks are ended too.
        with suppress(OSError):
            os.setpgid(process, process)
        _lines[kind] = ours
        failing.pop_all()


def ask(kind: Kind, function: Callable[..., Result], *args: Any, hands: int = 1) -> Callable[[], Result]:
    """Have `function(*args)` done beside this process, by so many `hands` where it takes `each`, an `Each`.

    What is given waits for the result.  Where nobody is there, or it has failed, it is done here and then.
    """
    here, line = partial(function, *args), _lines.get(kind)
    if line is None:
        return here
    try:
        ours, theirs = socket.socketpair()
    except OSError:
        return here
    connection = Connection(ours.detach())
    with theirs, suppress(OSError):  # of one that has died
        socket.send_fds(line, [b"."], [theirs.fileno()])
        theirs.close()
        connection.send((function, args, hands))
    return partial(_result, connection, here)


def _result(connection: Connection, here: Callable[[], Result]) -> Result:
    with connection, suppress(EOFError, OSError):
        result: Result = connection.recv()
        return result
    log.debug("%s: not done beside the command", here)
    return here()


# ---- their side -------------------------------------------------------------------------------------


def _die_with(parent: int) -> None:
    """Let the system kill this process when the one that forked it ends, however that may be."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def _help(command: int, kind: Kind, line: socket.socket, others: Sequence[socket.socket]) -> NoReturn:
    """Do what is asked on a line."""
    try:
        _die_with(command)
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the command's matter, which ends this one
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that are forked
        for end in others:
            end.close()
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(nowhere, stream)
        gc.disable()  # it would touch, and so copy, the memory that those that are forked share
        _KINDS[kind]()
        this = os.getpid()
        while asked := socket.recv_fds(line, 1, 1)[1]:
            (number,) = asked
            if os.fork() == 0:
                line.close()
                _do(this, Connection(number))
            os.close(number)
    finally:
        os._exit(0)


def _get_ready_to_draw() -> None:
    """Load what draws, and draw something: fonts and more are loaded late."""
    os.nice(10)  # what the command computes comes first: there is time until pictures are drawn
    from clusterlob_gpu import flow_pictures, page, pictures, report, sweep_pictures  # noqa: F401

    page.png(pictures.frame("", "", 1.0))


_KINDS |= {"tables": lambda: None, "pictures": _get_ready_to_draw}


def _do(helper: int, connection: Connection) -> NoReturn:
    """Do what is asked, send its result, and end the process."""
    try:
        _die_with(helper)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        function, args, hands = connection.recv()
        connection.send(function(*args, each=partial(_spread, hands)))
    finally:
        os._exit(0)


_work: tuple[Callable[[Any], Any], Sequence[Any]]
"""What those that are forked do, and of what."""


def _spread(hands: int, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`Each` over processes that are forked from this one."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    global _work  # they find it in the memory that they share, so that it need not be picklable
    _work = function, list(items)
    size = len(_work[1])
    if min(hands, size) < 2:
        return [_nth(number) for number in range(size)]
    hands = min(hands, size)
    with ProcessPoolExecutor(hands, get_context("fork"), _die_with, (os.getpid(),)) as pool:
        return list(pool.map(_nth, range(size)))


def _nth(number: int) -> Any:
    function, items = _work
    return function(items[number])
