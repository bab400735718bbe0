"""Which machine computes: chosen once, at the edge, and handed down.

A `Backend` says how columns are held, and which passes run over them; steps are written once for both.
Nothing of CUDA is imported before a GPU is asked for.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from clusterlob_gpu import flow_kernels, kernels
from clusterlob_gpu.errors import InputError
from clusterlob_gpu.lake import decode
from clusterlob_gpu.store import load_column, open_column, save_columns

Name = Literal["cpu", "gpu"]
Columns = Mapping[str, Any]
"""Arrays of the backend by name."""

_LEAST_ROWS = 1 << 16
"""Rows of a piece of a day below which a device is too small for this job."""

log = logging.getLogger(__name__)


class Backend(Protocol):
    """Arrays and passes of one machine."""

    name: Name
    xp: Any
    """numpy or cupy."""
    kernels: Any
    """`kernels` or `device_kernels`."""
    flow_kernels: Any
    """`flow_kernels` or `device_flow_kernels`."""
    decode: Any
    """`lake.decode` or `lake.device_decode`."""
    rows_at_once: int
    """Trades of a day whose features are held at once, a multiple of 4096."""
    rows_read: int | None
    """Trades of a day that are read at once; None: all of them."""

    def to_host(self, array: Any) -> np.ndarray:
        """NumPy array of an array."""
        ...

    def keep(self, folder: Path, address: str, columns: Columns) -> None:
        """Keep the columns of the trades of an artefact that is being written to `folder`."""
        ...

    def keeping(
        self, folder: Path, address: str, name: str, shape: tuple[int, int]
    ) -> AbstractContextManager[Any]:
        """Room for a float32 column, the only one of its artefact, that is filled by `[:, rows] =`."""
        ...

    def kept(self, folder: Path, address: str, names: Sequence[str], again: Callable[[], Columns]) -> Columns:
        """Columns that were kept; those that are held no longer are made `again`."""
        ...

    def make_room(self, attempt: int) -> bool:
        """Take less memory, less still after further attempts; False where nothing is left to give up."""
        ...

    def kmeans(self, z: Any, centroids: np.ndarray, most_passes: int) -> tuple[np.ndarray, int]:
        """Centres (k, 6) that the machine's library finds for z (6, n) from given ones, and its passes."""
        ...


@dataclass
class _Cpu:
    """This machine's cores and memory: trades of artefacts are files of the store."""

    name: Name = "cpu"
    xp: Any = np
    kernels: Any = kernels
    flow_kernels: Any = flow_kernels
    decode: Any = decode
    rows_at_once: int = 1 << 17
    rows_read: int | None = 1 << 16

    def to_host(self, array: np.ndarray) -> np.ndarray:
        return array

    def keep(self, folder: Path, address: str, columns: Columns) -> None:  # noqa: ARG002 - the folder says it
        save_columns(folder, **columns)

    def keeping(
        self,
        folder: Path,
        address: str,  # noqa: ARG002
        name: str,
        shape: tuple[int, int],
    ) -> AbstractContextManager[Any]:
        return open_column(folder, name, np.dtype(np.float32), shape)

    def kept(
        self,
        folder: Path,
        address: str,  # noqa: ARG002
        names: Sequence[str],
        again: Callable[[], Columns],  # noqa: ARG002 - files stay
    ) -> Columns:
        return {name: load_column(folder, name) for name in names}

    def make_room(self, attempt: int) -> bool:  # noqa: ARG002
        return False

    def kmeans(self, z: np.ndarray, centroids: np.ndarray, most_passes: int) -> tuple[np.ndarray, int]:
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits

        # One thread: the order of float sums, hence the last digit, must not depend on the machine.
        with threadpool_limits(limits=1):
            model = KMeans(len(centroids), init=centroids, n_init=1, max_iter=most_passes, tol=1e-9)
            model.fit(z.T.astype(np.float64))
        return model.cluster_centers_, int(model.n_iter_)


CPU: Backend = _Cpu()


@dataclass
class _Gpu:
    """One GPU: trades of artefacts stay in its memory, the store has but their record.

    What was used longest ago is let go when memory runs short, and made again when it is wanted.
    """

    xp: Any
    kernels: Any
    flow_kernels: Any
    decode: Any
    name: Name = "gpu"
    rows_at_once: int = 1 << 22
    rows_read: int | None = None
    _held: OrderedDict[str, Columns] = field(default_factory=OrderedDict)

    def to_host(self, array: Any) -> np.ndarray:
        host: np.ndarray = self.xp.asnumpy(array)
        return host

    def keep(self, folder: Path, address: str, columns: Columns) -> None:  # noqa: ARG002
        self._held[address] = columns

    @contextmanager
    def keeping(
        self,
        folder: Path,  # noqa: ARG002
        address: str,
        name: str,
        shape: tuple[int, int],
    ) -> Iterator[Any]:
        column = self.xp.empty(shape, np.float32)
        yield column
        self._held[address] = {name: column}

    def kept(
        self,
        folder: Path,  # noqa: ARG002
        address: str,
        names: Sequence[str],  # noqa: ARG002
        again: Callable[[], Columns],
    ) -> Columns:
        if address not in self._held:
            self._held[address] = again()
        self._held.move_to_end(address)
        return self._held[address]

    def make_room(self, attempt: int) -> bool:
        """Let go of all that is held; where that has not been enough, take days in half as large pieces."""
        held = bool(self._held)
        self._held.clear()
        if held and attempt == 0:
            return True
        if self.rows_at_once // 2 < _LEAST_ROWS:
            return False
        self.rows_at_once //= 2
        log.warning("device memory is short: days are taken in pieces of %d trades", self.rows_at_once)
        return True

    def kmeans(self, z: Any, centroids: np.ndarray, most_passes: int) -> tuple[np.ndarray, int]:
        """cuML's; its sums of floats have no fixed order, so that the last digits vary."""
        rows = self.xp.ascontiguousarray(z.T)
        start = self.xp.asarray(centroids.astype(np.float32))
        kind = import_module("cuml.cluster").KMeans
        model = kind(n_clusters=len(centroids), init=start, n_init=1, max_iter=most_passes, tol=1e-6)
        model.fit(rows)
        return self.to_host(self.xp.asarray(model.cluster_centers_)).astype(np.float64), int(model.n_iter_)


@cache
def of(name: Name) -> Backend:
    """The backend of that name in this process."""
    return CPU if name == "cpu" else _gpu()


def _gpu() -> Backend:
    missing = _why_no_gpu()
    if missing is not None:
        raise InputError(f"the gpu backend: {missing}; install it, or use --backend cpu")
    cupy, rmm = (import_module(name) for name in ("cupy", "rmm"))
    if type(rmm.mr.get_current_device_resource()) is rmm.mr.CudaMemoryResource:
        # Nobody has set up a pool: the driver's own spares a call of cudaMalloc for every array.
        rmm.mr.set_current_device_resource(rmm.mr.CudaAsyncMemoryResource())
    cupy.cuda.set_allocator(import_module("rmm.allocators.cupy").rmm_cupy_allocator)
    names = ("device_kernels", "device_flow_kernels", "lake.device_decode")
    rooms: list[Any] = [import_module(f"clusterlob_gpu.{name}") for name in names]
    return _Gpu(cupy, *rooms)


def choose(asked: str, gpus: bool | None = None) -> Name:
    """Backend of a run whose workers have GPUs or not; None: they have what this machine has.

    `auto` is gpu where there are some.  Raises InputError where gpu is asked for and this machine has none;
    workers elsewhere say so themselves.
    """
    if asked == "cpu" or (asked == "auto" and gpus is False):
        return "cpu"
    missing = _why_no_gpu() if gpus is None else None
    if missing is None:
        return "gpu"
    if asked == "gpu":
        raise InputError(f"--backend gpu: {missing}; use auto or cpu")
    return "cpu"


def _why_no_gpu() -> str | None:
    """What is missing for the GPU; None where it is there."""
    absent = [name for name in ("cupy", "cudf", "cuml", "rmm") if find_spec(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed (extra gpu-cu13 or gpu-cu12 of clusterlob_gpu)"
    try:
        devices = import_module("cupy").cuda.runtime.getDeviceCount()
    except Exception as error:  # a driver that is too old, or none at all
        return f"no CUDA device answers ({' '.join(str(error).split())})"
    return None if devices else "no CUDA device is visible"
