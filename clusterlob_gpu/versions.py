"""Which code computes: results may be compared, and artefacts shared, where this is the same."""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from importlib import metadata
from pathlib import Path

COMPUTING = ("numpy", "pandas", "pyarrow", "numba", "scikit-learn", "scipy")
"""Libraries whose version may change a number."""
LIBRARIES = (*COMPUTING, "dask", "distributed")


def _source_hash() -> str:
    root, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


CODE_VERSION = _source_hash()
"""Hash of the sources of this package when it was loaded: a file edited during a run is not what ran."""


@cache
def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries, by name."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in LIBRARIES}


@cache
def computing_versions() -> str:
    """Versions of all that computes besides this package, in one text."""
    versions = library_versions()
    minor = versions["python"].rpartition(".")[0]
    return " ".join([f"python {minor}", *(f"{name} {versions[name]}" for name in COMPUTING)])
