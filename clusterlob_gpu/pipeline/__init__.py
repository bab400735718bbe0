"""The order of the steps: `run` is what experiments share, `cluster` and `flow` are the two."""

from clusterlob_gpu.pipeline.cluster import label, run_cluster
from clusterlob_gpu.pipeline.flow import run_flow
from clusterlob_gpu.pipeline.run import RunRequest

__all__ = ["RunRequest", "label", "run_cluster", "run_flow"]
