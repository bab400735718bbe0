"""Numba's CUDA simulator takes device arrays of the stand-in, and refuses arrays of the host.

A real launch would copy a host array to the device and back, in silence and each time.  It would also fail
for an empty grid, which the simulator accepts.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numba.core.config import reload_config

_MOST_THREADS = 1024
_TURN_S = 2e-5
_original: Callable[..., Any] | None = None
# The simulator knows one launch at a time; threads of Dask may come with several.
_launching = threading.RLock()


def install() -> None:
    """Raises RuntimeError where numba.cuda was imported before the simulator was asked for."""
    global _original
    os.environ.setdefault("NUMBA_ENABLE_CUDASIM", "1")
    reload_config()  # Numba itself does so only before it compiles something
    try:
        from numba.cuda.core import config
        from numba.cuda.simulator.kernel import FakeCUDAKernel
    except ImportError:
        return  # without numba-cuda there are no kernels to launch
    if not config.ENABLE_CUDASIM:
        raise RuntimeError("numba.cuda was imported before NUMBA_ENABLE_CUDASIM=1 was set")
    if _original is None:
        _original = FakeCUDAKernel.__call__
        FakeCUDAKernel.__call__ = _launcher(_original)


def uninstall() -> None:
    global _original
    if _original is not None:
        from numba.cuda.simulator.kernel import FakeCUDAKernel

        FakeCUDAKernel.__call__, _original = _original, None


def _launcher(original: Callable[..., Any]) -> Callable[..., Any]:
    from numba.cuda.simulator import kernel as simulator

    from standin.device import current

    @functools.wraps(original)
    def launch(self: Any, *args: Any) -> Any:
        if self._device or (simulator._kernel_context is not None and _inside(simulator)):
            return original(self, *args)
        current().calls[f"kernel {self.fn.__name__}"] += 1
        _check_shape(self)
        with _launching, _quick_turns():
            return original(self, *(_argument(self.fn.__name__, each) for each in args))

    return launch


@contextmanager
def _quick_turns() -> Iterator[None]:
    """Let threads take turns often: the simulator's manager polls, and would hold them up 5 ms each time."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(_TURN_S)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


def _inside(simulator: Any) -> bool:
    """Whether this thread belongs to a kernel that is running."""
    return isinstance(threading.current_thread(), simulator.BlockThread)


def _check_shape(kernel: Any) -> None:
    grid, block = kernel.grid_dim, kernel.block_dim
    if grid is None or block is None:
        raise ValueError(f"{kernel.fn.__name__}: launch configuration was not specified")
    if not all((*grid, *block)):
        raise ValueError(
            f"{kernel.fn.__name__}: an empty launch, {grid} blocks of {block}: CUDA_ERROR_INVALID_VALUE"
        )
    if np.prod(block) > _MOST_THREADS:
        raise ValueError(f"{kernel.fn.__name__}: {block} threads of a block, at most {_MOST_THREADS}")


def _argument(name: str, value: Any) -> Any:
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

    from standin.cupy_standin import ndarray

    if isinstance(value, ndarray):
        return FakeCUDAArray(value._host)
    if isinstance(value, tuple):
        return tuple(_argument(name, each) for each in value)
    if isinstance(value, bool | int | float | np.number | np.bool_ | FakeCUDAArray):
        return value
    raise TypeError(f"{name}: a kernel takes device arrays and numbers, not {type(value)}")
