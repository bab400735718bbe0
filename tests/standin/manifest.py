"""Names and signatures of the real GPU libraries, and the guard that keeps the stand-in to them.

`api_manifest.json.gz` was read from the wheels by scripts/make_api_manifest.  What the stand-in offers is
checked against it when it is defined, what is asked of the stand-in when it is called:

- a name that the real library lacks raises AttributeError, a keyword that it does not take TypeError;
- a name that is there but raises in reality (`RAISING`) raises NotImplementedError;
- a name or keyword that the real library has and the stand-in lacks raises NotImplementedError too, with
  "stand-in lacks ...": nothing passes silently.
"""

from __future__ import annotations

import functools
import gzip
import inspect
import json
import re
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from standin.device import current

_STORED = json.loads(gzip.decompress((Path(__file__).parent / "api_manifest.json.gz").read_bytes()))
API: dict[str, dict[str, dict[str, Any]]] = _STORED["api"]
VERSIONS = {re.sub(r"-cu(da)?\d+x?$", "", name): version for name, version in _STORED["versions"].items()}
"""Version by library: cudf, cuml, cupy, dask-cuda, rmm, ..."""

_KINDS = {
    "POSONLY": inspect.Parameter.POSITIONAL_ONLY,
    "POSWORD": inspect.Parameter.POSITIONAL_OR_KEYWORD,
    "VARONAL": inspect.Parameter.VAR_POSITIONAL,
    "KEYONLY": inspect.Parameter.KEYWORD_ONLY,
    "VARWORD": inspect.Parameter.VAR_KEYWORD,
}

RAISING: dict[str, str] = {
    # Methods whose body in cudf 26.10.2 is `raise NotImplementedError`.
    "cudf.core.groupby.groupby.DataFrameGroupBy": (
        "ohlc expanding ewm resample filter take plot hist boxplot"
    ),
    "cudf.core.groupby.groupby.SeriesGroupBy": (
        "ohlc expanding ewm resample filter take plot hist dtype is_monotonic_increasing "
        "is_monotonic_decreasing nlargest nsmallest value_counts corr"
    ),
    "cudf.core.window.rolling.Rolling": "median agg aggregate",
    "cudf.core.window.rolling.RollingGroupby": "median agg aggregate",
}

ADDITIONS: dict[str, str] = {
    # CuPy reference, "Low-level CUDA support" and "Custom allocators": cupy.cuda is not in the manifest.
    "cupy.cuda": (
        "Device Event ExternalStream Graph ManagedMemory Memory MemoryAsyncPool MemoryHook "
        "MemoryPointer MemoryPool PinnedMemoryPool PythonFunctionAllocator Stream UnownedMemory alloc "
        "alloc_pinned_memory get_allocator get_current_stream get_device_id get_elapsed_time "
        "get_local_runtime_version is_available malloc_async malloc_managed set_allocator "
        "set_pinned_memory_allocator using_allocator memory runtime stream device"
    ),
    "cupy.cuda.memory": (
        "Memory MemoryPointer MemoryPool OutOfMemoryError UnownedMemory alloc set_allocator"
    ),
    "cupy.cuda.runtime": (
        "CUDARuntimeError deviceGetAttribute deviceSynchronize driverGetVersion getDevice "
        "getDeviceCount getDeviceProperties memGetInfo runtimeGetVersion setDevice streamSynchronize"
    ),
    "cupy.cuda.Device": (
        "attributes compute_capability id mem_info pci_bus_id synchronize use from_pci_bus_id"
    ),
    "cupy.cuda.Stream": (
        "null ptds ptr device_id done record synchronize use wait_event add_callback launch_host_func"
    ),
    "cupy.cuda.Event": "done ptr record synchronize",
    "cupy.cuda.MemoryPool": (
        "free_all_blocks free_all_free free_bytes get_limit malloc n_free_blocks set_limit total_bytes "
        "used_bytes"
    ),
    "cupy.cuda.PinnedMemoryPool": "free_all_blocks malloc n_free_blocks",
    # CuPy reference, "cupy.ufunc"; its methods are Cython.
    "cupy.ufunc": "accumulate at name nargs nin nout outer reduce reduceat types",
    "cupy.lib": "stride_tricks",
    # RMM Python API reference.
    "rmm.allocators": "cupy numba torch",
    "rmm.allocators.cupy": "rmm_cupy_allocator",
    "rmm.statistics": (
        "Statistics ProfilerRecords enable_statistics get_statistics pop_statistics profiler "
        "push_statistics statistics default_profiler_records"
    ),
    "rmm.DeviceBuffer": (
        "capacity copy copy_from_device copy_from_host copy_to_host mr nbytes prefetch ptr reserve "
        "resize size stream to_device tobytes"
    ),
    # cuML API reference.
    "cuml": "cluster dask set_global_output_type using_output_type global_settings KMeans",
    "cuml.cluster": "KMeans DBSCAN HDBSCAN AgglomerativeClustering SpectralClustering",
    "cuml.dask": "cluster",
    "cuml.dask.cluster": "KMeans DBSCAN",
    # Dask-CUDA API reference.
    "dask_cuda": "CUDAWorker LocalCUDACluster",
}


def lacks(what: str) -> NotImplementedError:
    return NotImplementedError(f"stand-in lacks {what}; add it")


class Surface:
    """What one class or module of a real library shows; `label` is its name in messages."""

    def __init__(self, path: str, label: str | None = None) -> None:
        if path not in API and path not in ADDITIONS:
            raise LookupError(f"the manifest has no {path}")
        self.label = label or path
        self._members = API.get(path, {})
        self._names = {*self._members, *ADDITIONS.get(path, "").split()}
        self._raising = set(RAISING.get(path, "").split())
        library = path.split(".")[0]
        self._library = f"{library} {VERSIONS.get(library.replace('_', '-'), '')}".strip()

    def check(self, names: Iterable[str]) -> None:
        """The stand-in itself may not offer more than the real library."""
        if extra := sorted(name for name in names if name[0] != "_" and name not in self._names):
            raise AssertionError(f"{self._library}: {self.label} has no {', '.join(extra)}")

    def signature(self, name: str) -> inspect.Signature | None:
        """The real signature; None where the library is compiled and has none."""
        parameters = self._members.get(name, {}).get("p")
        if parameters is None:
            return None
        # The manifest says only whether there is a default, never which.
        return inspect.Signature(
            [
                inspect.Parameter(each, _KINDS[kind], default=None if default else inspect.Parameter.empty)
                for each, kind, default in parameters
            ]
        )

    def absent(self, name: str) -> Callable[..., Any]:
        """What an attribute that the stand-in does not define gives: mostly an exception."""
        if name.startswith("_"):
            raise AttributeError(name)
        what = f"{self.label}.{name}"
        if name in self._raising:

            def raising(*_: Any, **__: Any) -> None:
                raise NotImplementedError(f"{what} is a stub that raises in {self._library}")

            return raising
        if name in self._names:
            raise lacks(what)
        raise AttributeError(f"{self._library} has no {what}")

    def guard(self, name: str, function: Callable[..., Any], real: str = "") -> Callable[..., Any]:
        """`function`, called only with what the real one of this name (or `real`) takes; counts calls."""
        return guarded(f"{self.label}.{name}", function, self.signature(real or name))


def guarded(what: str, function: Callable[..., Any], real: inspect.Signature | None) -> Callable[..., Any]:
    own = inspect.signature(function)
    takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in own.parameters.values())
    named = None if takes_all or real is None else {*real.parameters, *own.parameters}

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        current().calls[what] += 1
        if real is not None:
            try:
                real.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{what}(): {error}") from None
        # What only a **kwargs takes is passed on in reality, to fail elsewhere or to be ignored.
        if named is not None and (extra := set(kwargs) - named):
            raise TypeError(f"{what}() has no keyword {', '.join(sorted(extra))}")
        try:
            own.bind(*args, **kwargs)
        except TypeError as error:
            raise lacks(f"an argument of {what}() ({error})") from None
        return function(*args, **kwargs)

    return call


def mirror(path: str, label: str | None = None) -> Callable[[type], type]:
    """Class decorator: the class stands for the real one at `path` and has no other public names."""
    surface = Surface(path, label)

    def decorate(cls: type) -> type:
        public = {name: member for name, member in vars(cls).items() if not name.startswith("_")}
        surface.check(name for name in public if name not in getattr(cls, "__slots__", ()))
        for name, member in public.items():
            if isinstance(member, classmethod):
                setattr(cls, name, classmethod(surface.guard(name, member.__func__)))
            elif inspect.isfunction(member):
                setattr(cls, name, surface.guard(name, member))
        if "__init__" in vars(cls) and path in API:
            cls.__init__ = guarded(surface.label, cls.__init__, surface.signature("__init__"))
        cls.__getattr__ = lambda _, name: surface.absent(name)
        return cls

    return decorate


class Room(ModuleType):
    """A module of a real library, as far as the stand-in has it."""

    def __init__(self, name: str, members: dict[str, Any], path: str | None = None) -> None:
        super().__init__(name)
        surface = Surface(path or name, name)
        surface.check(member for member, value in members.items() if not isinstance(value, ModuleType))
        self.__spec__ = ModuleSpec(name, None)
        self.__path__: list[str] = []
        self.__version__ = VERSIONS.get(name.replace("_", "-"), "")
        self.__dict__["_surface"] = surface
        for member, value in members.items():
            plain = inspect.isfunction(value) and not hasattr(value, "__wrapped__")
            self.__dict__[member] = surface.guard(member, value) if plain else value

    def __getattr__(self, name: str) -> Any:
        return self.__dict__["_surface"].absent(name)
