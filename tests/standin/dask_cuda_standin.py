"""dask_cuda: a local cluster of processes without GPUs, in each of which the stand-in is installed.

dask_cudf has its names and does nothing: the project does not use it.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

from distributed import LocalCluster

from standin.manifest import Room, Surface, guarded

_SURFACE = Surface("dask_cuda.LocalCUDACluster")


class LocalCUDACluster(LocalCluster):
    """distributed's LocalCluster with dask-cuda's keywords, kept in `asked` as they were given."""

    asked: ClassVar[list[dict[str, Any]]] = []
    processes: ClassVar[bool] = True
    """Whether workers are processes, as in reality; threads of this one start faster."""

    def __init__(self, **options: Any) -> None:
        self.asked.append(options)
        _check(options)
        passed = {name: options[name] for name in _PASSED if options.get(name) is not None}
        # A worker has a GPU to itself, hence one worker and one thread unless told otherwise.
        passed = {"n_workers": 1, "threads_per_worker": 1, **passed, "processes": self.processes}
        if self.processes:
            passed["preload"] = "standin.worker"
        else:
            passed |= {"host": None, "protocol": "inproc"}
        super().__init__(**passed)


LocalCUDACluster.__init__ = guarded(_SURFACE.label, LocalCUDACluster.__init__, _SURFACE.signature("__init__"))

_PASSED = (
    "n_workers", "threads_per_worker", "memory_limit", "local_directory", "host", "dashboard_address",
    "silence_logs", "name",
)  # fmt: skip
_KNOWN_KWARGS = {
    *_PASSED,
    "worker_class",
    "processes",
    "data",
    "security",
    "asynchronous",
    "loop",
    "scheduler_port",
}


def _check(options: dict[str, Any]) -> None:
    """What dask_cuda/local_cuda_cluster.py refuses; what LocalCluster does not know either is a typo."""
    named = set(_SURFACE.signature("__init__").parameters)
    if unknown := set(options) - named - _KNOWN_KWARGS:
        raise TypeError(f"LocalCUDACluster has no {sorted(unknown)}")
    if not options.get("processes", True):
        raise ValueError("Processes are necessary in order to use multiple GPUs with Dask")
    if options.get("threads_per_worker", 1) < 1:
        raise ValueError("threads_per_worker must be higher than 0.")
    if (options.get("n_workers") or 1) < 1:
        raise ValueError("Number of workers cannot be less than 1.")
    if options.get("rmm_async") and options.get("rmm_pool_size") is not None:
        warnings.warn(
            "'rmm_pool_size' is not needed when 'rmm_async' is enabled", FutureWarning, stacklevel=3
        )
    fast = options.get("enable_infiniband") or options.get("enable_nvlink")
    if fast and "ucx" not in (options.get("protocol") or ""):
        raise TypeError("Enabling InfiniBand or NVLink requires protocol='ucx'")


rooms = {
    "dask_cuda": Room("dask_cuda", {"LocalCUDACluster": LocalCUDACluster}),
    "dask_cudf": Room("dask_cudf", {}),
}
