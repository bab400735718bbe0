"""Choosing a backend where there is no RAPIDS."""

from __future__ import annotations

import subprocess
import sys

import pytest

from clusterlob_gpu import backend
from clusterlob_gpu.errors import InputError


def test_choose__without_rapids_says_what_is_missing() -> None:
    """Workers elsewhere are believed until they say otherwise."""
    assert backend.choose("auto") == "cpu"
    assert backend.choose("auto", gpus=True) == "gpu"
    with pytest.raises(InputError, match=r"--backend gpu: cupy, cudf, cuml, rmm not installed"):
        backend.choose("gpu")


def test_import__needs_no_rapids_and_touches_no_cuda() -> None:
    code = (
        "import sys, pkgutil, importlib, clusterlob_gpu\n"
        "names = [m.name for m in pkgutil.walk_packages(clusterlob_gpu.__path__, 'clusterlob_gpu.')]\n"
        "host = [name for name in names if 'device_' not in name]\n"
        "assert len(host) > 60\n"
        "for name in host: importlib.import_module(name)\n"
        "rapids = ('cupy', 'cudf', 'cuml', 'rmm')\n"
        "cuda = [n for n in sys.modules if n.split('.')[0] in rapids or n == 'numba.cuda']\n"
        "assert cuda == [], cuda\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
