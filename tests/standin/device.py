"""The memory of a device that is not there: who holds how much, and how much may be held."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections import Counter
from typing import Any

import numpy as np

TOTAL = 80 * 2**30
"""Bytes of the device unless a test sets a limit."""


class OutOfMemoryError(MemoryError):
    """cupy.cuda.memory.OutOfMemoryError."""


class Device:
    """Bytes held on the device, and names that were called."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        """Bytes that may be held at once; None is no limit."""
        self.allocated = 0
        self.peak = 0
        self.calls: Counter[str] = Counter()
        """How often each function, method and kernel was called, by its name in the real library."""
        self.allocator = "cupy"
        """Which library hands out CuPy's memory: `cupy` or `rmm`."""
        self._held: Counter[int] = Counter()
        # Reentrant: a finalizer may run while the lock is held.
        self._lock = threading.RLock()

    @property
    def total(self) -> int:
        return TOTAL if self.limit is None else self.limit

    def adopt(self, array: np.ndarray, allocator: str | None = None) -> None:
        """Count the memory behind an array, once for all its views, until nobody holds it."""
        owner = _owner(array)
        if id(owner) not in self._held:
            self.hold(owner, id(owner), owner.nbytes, allocator)

    def hold(self, holder: Any, key: int, nbytes: int, allocator: str | None = None) -> None:
        """Count `nbytes` under a key for as long as any of its holders lives."""
        with self._lock:
            if key not in self._held:
                self._take(nbytes, allocator or self.allocator)
            self._held[key] += 1
        weakref.finalize(holder, self._release, key, nbytes).atexit = False

    def _take(self, nbytes: int, allocator: str) -> None:
        if self.limit is not None and self.allocated + nbytes > self.limit:
            gc.collect()
            if self.allocated + nbytes > self.limit:
                raise self._out_of_memory(nbytes, allocator)
        self.allocated += nbytes
        self.peak = max(self.peak, self.allocated)

    def _release(self, key: int, nbytes: int) -> None:
        with self._lock:
            self._held[key] -= 1
            if not self._held[key]:
                del self._held[key]
                self.allocated -= nbytes

    def _out_of_memory(self, nbytes: int, allocator: str) -> MemoryError:
        if allocator == "rmm":
            return MemoryError(f"std::bad_alloc: out_of_memory: {nbytes} bytes of {self.limit}")
        return OutOfMemoryError(
            f"Out of memory allocating {nbytes:,} bytes (allocated so far: {self.allocated:,} bytes, "
            f"limit set to: {self.limit:,} bytes)."
        )


def _owner(array: np.ndarray) -> np.ndarray:
    """The array whose memory this one shows."""
    while True:
        base = array.base
        if not isinstance(base, np.ndarray):
            base = getattr(base, "base", None)  # stride tricks put an object in between
        if not isinstance(base, np.ndarray):
            return array
        array = base


_limit = os.environ.get("STANDIN_MEMORY_LIMIT")
_current = Device(int(_limit) if _limit else None)


def current() -> Device:
    return _current


def use(device: Device) -> Device:
    """Make this the device.  Arrays of the one before are still counted there."""
    global _current
    _current = device
    return device
