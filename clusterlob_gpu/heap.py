"""Memory that one day's arrays leave for those of the next.

glibc, and Arrow's own allocator, would give it back, and the system would clear every page anew, which takes
as long as a pass over it.  All threads, NumPy and Arrow have one heap here that keeps it, so that one uses
what another has freed.  NumPy asks for no huge pages: one is cleared whole, however little of it is used.
With another C library nothing changes.
"""

from __future__ import annotations

import ctypes
import os
import platform

_MMAP_THRESHOLD, _TRIM_THRESHOLD = 32 << 20, (1 << 31) - 1
"""Bytes: the most that glibc takes, and never."""
_MALLOPT = {
    "MALLOC_ARENA_MAX": (-8, 1),
    "MALLOC_MMAP_THRESHOLD_": (-3, _MMAP_THRESHOLD),
    "MALLOC_TRIM_THRESHOLD_": (-1, _TRIM_THRESHOLD),
}
"""Number and value of each of glibc's parameters, by its name in an environment."""
_LIBRARIES = {"ARROW_DEFAULT_MEMORY_POOL": "system", "NUMPY_MADVISE_HUGEPAGE": "0"}
AT_START = {name: str(value) for name, (_, value) in _MALLOPT.items()} | _LIBRARIES
"""The same for a process that is to be started, as environment."""


def keep() -> None:
    """Set it up for this process, before it loads NumPy or Arrow and has any thread."""
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    for option, value in _MALLOPT.values():
        mallopt(option, value)
    for name, choice in _LIBRARIES.items():
        os.environ.setdefault(name, choice)
