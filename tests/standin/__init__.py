# ruff: noqa: ARG002 - parameters are those of importlib
"""A strict stand-in for cudf, cupy, cuml, rmm and dask-cuda, for machines without a GPU.

    with standin.installed(memory_limit=2**20) as device:
        import cupy                      # the stand-in
        ...
    device.allocated, device.peak, device.calls

It computes with pandas, NumPy and scikit-learn, has no name and takes no keyword that the real wheels lack
(`manifest` says how), counts the memory of the device, and runs Numba-CUDA kernels under Numba's simulator,
to which it hands device arrays and nothing else.  It says nothing about speed, the order of float sums, or
races.  Where CuPy and cuDF leave an order or a value open it picks an awkward one or raises.

Child processes get it from `environment()`, Dask's worker processes by themselves.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

# Numba reads it when numba.cuda is imported.
os.environ.setdefault("NUMBA_ENABLE_CUDASIM", "1")

from standin import numba_hook
from standin.device import Device, current, use

_MODULES = {
    "cudf": "cudf_standin",
    "cuml": "cuml_standin",
    "cupy": "cupy_standin",
    "cupyx": "cupy_standin",
    "dask_cuda": "dask_cuda_standin",
    "dask_cudf": "dask_cuda_standin",
    "rmm": "rmm_standin",
}
"""Which module of this package stands for a library; each has `rooms`, the modules by name."""


class _Finder(MetaPathFinder, Loader):
    """Gives the stand-in's modules to `import`, each when it is first asked for."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        home = _MODULES.get(fullname.partition(".")[0])
        if home is None or fullname not in importlib.import_module(f"standin.{home}").rooms:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        home = _MODULES[spec.name.partition(".")[0]]
        return importlib.import_module(f"standin.{home}").rooms[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        numba_hook.install()
        for part in list(vars(module).values()):
            if isinstance(part, ModuleType) and part.__name__.startswith(f"{module.__name__}."):
                importlib.import_module(part.__name__)


_finder = _Finder()


def _ours() -> dict[str, ModuleType]:
    """What is imported under the names that are stood in for."""
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in _MODULES}


def install() -> None:
    """Put the stand-in in the place of the GPU libraries, for good."""
    if _finder not in sys.meta_path:
        for name in _ours():
            del sys.modules[name]
        sys.meta_path.insert(0, _finder)


@contextmanager
def installed(memory_limit: int | None = None) -> Iterator[Device]:
    """The stand-in in the place of the GPU libraries, and an empty device of `memory_limit` bytes.

    The limit holds in this process; worker processes have none.
    """
    inner, before, outer = _finder in sys.meta_path, _ours(), current()
    install()
    numba_hook.install()
    try:
        yield use(Device(memory_limit))
    finally:
        use(outer)
        if not inner:
            numba_hook.uninstall()
            sys.meta_path.remove(_finder)
            for name in _ours():
                del sys.modules[name]
            sys.modules.update(before)


def run(source: str, memory_limit: int | None = None, **names: Any) -> dict[str, Any]:
    """Execute a piece of program under the stand-in; returns its names.  What is refused raises."""
    scope = dict(names)
    with installed(memory_limit):
        exec(compile(source, "<under the stand-in>", "exec"), scope)
    return scope


def environment(memory_limit: int | None = None) -> dict[str, str]:
    """Variables with which a child process finds the stand-in under the names of the GPU libraries."""
    tests = Path(__file__).resolve().parent.parent
    paths = [str(tests / "standin" / "site"), str(tests), *filter(None, [os.environ.get("PYTHONPATH")])]
    limit = {} if memory_limit is None else {"STANDIN_MEMORY_LIMIT": str(memory_limit)}
    return {"PYTHONPATH": os.pathsep.join(paths), "NUMBA_ENABLE_CUDASIM": "1", **limit}
