# ruff: noqa: E402 - kernels are imported after what stands for CuPy
"""Compiles every kernel for A100 and H100 without a driver: `test_ptx` runs this in a process of its own.

Prints a line per kernel, signature and architecture: bytes of shared memory and registers of a thread.
"""

from __future__ import annotations

import re
import struct
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

# Kernels do without it; only the passes around them use it.
sys.modules["cupy"] = ModuleType("cupy")

from numba import boolean, float32, float64, int8, int32, int64, types, uint8, uint16, uint32, void
from numba.cuda import compiler, dispatcher

from clusterlob_gpu import device_flow_kernels, device_kernels


def rows(kind: types.Type) -> types.Array:
    """Columns of a wider array."""
    return types.Array(kind, 2, "A")


bins, side, flag, column, small = uint16[::1], uint8[::1], boolean[::1], int64[::1], int32[::1]
sign, label, real, bits = int8[::1], int8[::1], float64[::1], uint32[::1]
table, cube, counts = int64[:, ::1], int64[:, :, ::1], int32[:, ::1]
reals, sums, z = float64[:, ::1], float64[:, :, ::1], float32[:, ::1]
context = (column, real, real, real, column, column, column)
# Types of the arguments with which runs launch the kernels.
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


def registers(cubin: bytes) -> int:
    """The most that a function of an ELF file takes, in eights: attribute 0x2f of its section .nv.info."""
    at, (size, n, names) = *struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<3H", cubin, 0x3A)
    sections = [struct.unpack_from("<2I4Q", cubin, at + i * size) for i in range(n)]
    start = sections[names][4]
    (info,) = (s for s in sections if cubin[start + s[0] :].startswith(b".nv.info\0"))
    i, most = info[4], 0
    while i < info[4] + info[5]:
        layout, attribute, value = struct.unpack_from("<2BH", cubin, i)
        if attribute == 0x2F:
            most = max(most, *struct.unpack_from("<4xI", cubin, i + 4))
        i += 4 + (value if layout == 4 else 0)
    assert most > 0, "no number of registers found"
    return -(-most // 8) * 8


def check(name: str, kernel: Any, signature: tuple[Any, ...]) -> None:
    """Compile and assemble a kernel for both architectures."""
    typed = {"cc": (8, 0), "device": False, "abi": "numba"}
    library, _ = compiler._compile_pyfunc_with_fixup(kernel.py_func, void(*signature), **typed)
    threads = device_kernels.WIDEST if name == "_rolling_z" else 256
    for cc in ((8, 0), (9, 0)):
        ptx = library.get_asm_str(cc=cc)
        assert f".target sm_{cc[0]}{cc[1]}" in ptx, name
        assert ptx.count(".visible .entry") == 1, name
        shared = sum(int(size) for size in re.findall(r"\.shared [^;]*\[(\d+)\];", ptx))
        assert shared <= 48 << 10, (name, shared)
        assert ".local" not in ptx, name
        # Arithmetic is that of float64: the sum that finds a NaN among the z of a row is not stored.
        single = set(re.findall(r"(?:add|sub|mul|div|fma|sqrt)(?:\.\w+)*\.f32", ptx))
        assert not single or name == "_void_nulls", (name, single)
        taken = registers(bytes(library.get_cubin(cc=cc).code))
        assert taken * threads <= 1 << 16, (name, cc, taken)
        print(name, cc, shared, taken)


# Device functions ask for it; what they become is lowered for each architecture later.
dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=(8, 0))
for module, known in ((device_kernels, CLUSTER), (device_flow_kernels, FLOW)):
    kernels = {
        name: kernel
        for name, kernel in vars(module).items()
        if isinstance(kernel, dispatcher.CUDADispatcher) and not kernel.targetoptions.get("device")
    }
    assert set(kernels) == set(known), set(kernels) ^ set(known)
    for name, signatures in known.items():
        for signature in signatures:
            check(name, kernels[name], signature)
