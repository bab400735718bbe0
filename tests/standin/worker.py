"""Preloaded by the worker processes of the stand-in's LocalCUDACluster."""

import standin
from standin import cupy_standin

standin.install()
cupy_standin.register_with_dask()
