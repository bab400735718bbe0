"""Memory is kept: set up in this process as in those that it starts."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from clusterlob_gpu import heap

FREED = """
import os, sys
{}
import numpy as np, pyarrow as pa
arrays = [np.ones(1 << 20) for _ in range(16)]
del arrays
held = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
print(pa.default_memory_pool().backend_name, held >> 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_keep__memory_that_was_freed_is_still_there() -> None:
    def run(first: str, **more: str) -> tuple[str, int]:
        environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
        environment.pop("ARROW_DEFAULT_MEMORY_POOL", None)
        command = [sys.executable, "-c", FREED.format(first)]
        found = subprocess.run(command, env=environment | more, capture_output=True, text=True, check=True)
        pool, held = found.stdout.split()
        return pool, int(held)

    _, given_back = run("")
    pool, kept = run("from clusterlob_gpu import heap; heap.keep()")
    assert pool == "system"
    assert kept > given_back + 100  # of 128 MiB
    pool, at_start = run("", **heap.AT_START)
    assert pool == "system"
    assert at_start > given_back + 100
