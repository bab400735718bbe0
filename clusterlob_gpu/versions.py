"""Which code computes: results may be compared, and artefacts shared, where this is the same."""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from importlib import metadata
from pathlib import Path

LIBRARIES = ("numpy", "pandas", "pyarrow", "numba", "scikit-learn", "dask", "distributed", "statsmodels")


@cache
def code_version() -> str:
    """Hash of the sources of this package, in the order of their names."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


@cache
def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that compute, by name."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in LIBRARIES}
