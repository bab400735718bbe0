"""Every kernel compiles for A100 and H100, without a driver."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import re, sys
from types import ModuleType, SimpleNamespace

sys.modules["cupy"] = ModuleType("cupy")  # kernels do without
from numba import boolean, cuda, float32, float64, int8, int32, int64, types, uint8, uint16, uint32, void
from numba.cuda import dispatcher
from clusterlob_gpu import device_flow_kernels, device_kernels


def rows(kind):  # columns of a wider array
    return types.Array(kind, 2, "A")


bins, side, flag, column, small = uint16[::1], uint8[::1], boolean[::1], int64[::1], int32[::1]
sign, label, real, bits = int8[::1], int8[::1], float64[::1], uint32[::1]
table, cube, counts = int64[:, ::1], int64[:, :, ::1], int32[:, ::1]
reals, sums, z = float64[:, ::1], float64[:, :, ::1], float32[:, ::1]
context = (column, real, real, real, column, column, column)
FLOW = {
    "_bin_sizes": [(column, bins, column)],
    "_count_keys": [(bins, column), (column, column)],
    "_sub_keys": [(column, bins, column, column)],
    "_pass_edge": [(bins, small, column, int32, counts), (column, small, column, int32, counts)],
    "_cumulate": [(counts,)],
    "_find_ranks": [(counts, counts, table, table, table, table)],
    "_begins": [(column, column, side, column, int64, int64, flag)],
    "_order_sums": [(column, column, column, column)],
    "_bar_prices": [(column, column, column, table)],
    "_bar_largest": [(column, column, cube)],
    "_class_flow": [(column, side, column, table, table, cube)],
}
CLUSTER = {
    "_unsorted": [(column, small, small, small)],
    "_reduce_levels": [(column, column, int64, column, column)],
    "_book_fault": [(column, column, column, column, side)],
    "_asof_before": [(column, column, boolean, column)],
    "_meet_book": [(column, side, column, int64, boolean, small, side)],
    "_raw_features": [(column, sign, column, small, *context, boolean, rows(float64))],
    "_void_nulls": [(rows(float32),), (reals,)],
    "_nearest": [(rows(float32), real, real, reals, label, real), (z, real, real, reals, label, real)],
    "_clip_columns": [(rows(float32), real, real, z)],
    "_count_high_bits": [(bits, column)],
    "_count_low_bits": [(bits, uint32, column)],
    "_rolling_z": [(rows(float64), int64, int64, rows(float32)), (rows(float64), int64, int64, reals)],
    "_piece_sums": [(rows(float32), real, real, label, sums), (rows(float64), real, real, label, sums)],
    "_bucket_flow": [(column, sign, column, column, label, cube)],
    "_markouts": [(column, column, sign, small, label, column, column, int64, int64, column, cube, sums)],
}
for module, known in ((device_kernels, CLUSTER), (device_flow_kernels, FLOW)):
    kernels = {
        name: kernel
        for name, kernel in vars(module).items()
        if isinstance(kernel, dispatcher.CUDADispatcher) and not kernel.targetoptions.get("device")
    }
    assert set(kernels) == set(known), set(kernels) ^ set(known)
    for cc in ((8, 0), (9, 0)):
        dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=cc)
        for name, signatures in known.items():
            for signature in signatures:
                function = kernels[name].py_func
                ptx, _ = cuda.compile(function, void(*signature), cc=cc, device=False, abi="numba")
                shared = sum(int(size) for size in re.findall(r"\\.shared [^;]*\\[(\\d+)\\];", ptx))
                assert f".target sm_{cc[0]}{cc[1]}" in ptx, name
                assert shared <= 48 << 10, (name, shared)
                assert name != "_rolling_z" or ".f64" in ptx
            print(name, cc)
"""


def test_ptx__every_kernel_compiles() -> None:
    """With the types of production, and no more shared memory than a block has anywhere.

    In a process of its own: elsewhere in the tests Numba simulates.
    """
    pytest.importorskip("nvidia.cu13")
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "0"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2 * (15 + 11)
    print("26 kernels compiled for sm_80 and sm_90")
