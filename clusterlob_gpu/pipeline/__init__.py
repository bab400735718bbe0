"""The order of the steps: `run` is what every experiment shares, `cluster` is the trade clusters."""

from clusterlob_gpu.pipeline.cluster import check_request, label, run_cluster
from clusterlob_gpu.pipeline.run import RunRequest

__all__ = ["RunRequest", "check_request", "label", "run_cluster"]
