"""Every kernel compiles for A100 and H100, without a driver."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("ptx.py")


def test_ptx__every_kernel_compiles() -> None:
    """With the types of production; a block has the registers and the shared memory that it needs.

    In a process of its own: elsewhere in the tests Numba simulates.
    """
    pytest.importorskip("nvidia.cu13")
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "0"}
    done = subprocess.run(
        [sys.executable, PROGRAM], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    compiled = {tuple(line.split(" ", 1)) for line in done.stdout.splitlines()}
    names = {name for name, _ in compiled}
    assert len(names) == 15 + 11
    print(f"{len(names)} kernels compiled for sm_80 and sm_90: shared memory and registers of each")
    print(done.stdout)
