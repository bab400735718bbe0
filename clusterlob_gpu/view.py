"""The tables of one symbol of a cluster run, as its words, tables and pictures all read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from clusterlob_gpu.lake.layout import day_of_us
from clusterlob_gpu.schema import ALL_CLUSTERS

SIDES = {"own": "consumed", "consumed": "own"}


@dataclass(frozen=True)
class View:
    """The tables of one symbol and what is said of all of them."""

    symbol: str
    info: dict[str, Any]
    """run.json"""
    centroids: pd.DataFrame
    buckets: pd.DataFrame
    ic: pd.DataFrame
    markouts: pd.DataFrame
    tests: int
    """ICs of the run, all symbols together, for which p was corrected."""

    @property
    def in_sample(self) -> bool:
        return self.info["sample"] == "in_sample"

    @property
    def latest(self) -> pd.DataFrame:
        """Clusters of the last window."""
        last = self.centroids["window_id"].max()
        return self.centroids[self.centroids["window_id"] == last].sort_values("cluster")

    @property
    def walks(self) -> bool:
        return len(set(self.centroids["window_id"])) > 1

    @property
    def side(self) -> str:
        return str(self.info["config"]["same_side"])

    @property
    def last_days(self) -> str:
        """Days that the last window labelled: `2024-05-03 to 2024-05-04`."""
        last = self.buckets.loc[self.buckets["window_id"] == self.centroids["window_id"].max(), "bucket_ts"]
        first, end = (str(day_of_us(int(ts))) for ts in (last.min(), last.max()))
        return first if first == end else f"{first} to {end}"

    @property
    def pooled(self) -> bool:
        """Whether some cluster had other names in other windows."""
        return bool(self.centroids.groupby("cluster")["label"].nunique().gt(1).any())

    def name(self, cluster: int) -> str:
        """Number and name over all windows: `2 directional`, `2 directional in 3 of 4 windows`, `3 other`."""
        if cluster == ALL_CLUSTERS:
            return "all clusters"
        return _numbered(cluster, dict(zip(self.ic["cluster"], self.ic["label"], strict=True)))

    def last_name(self, cluster: int) -> str:
        """Number and name in the last window."""
        return _numbered(cluster, dict(zip(self.latest["cluster"], self.latest["label"], strict=True)))


def _numbered(cluster: int, labels: dict[int, str]) -> str:
    label = labels.get(cluster, "").replace(f"other {cluster}", "other")
    return f"{cluster} {label}".strip()


def distinct_targets(rows: pd.DataFrame) -> list[str]:
    """Targets by rising horizon; r_<bucket> is frnb and shown once."""
    first = rows.drop_duplicates("target").sort_values("horizon_us", kind="stable")
    next_bucket = first.loc[first["target"] == "frnb", "horizon_us"]
    twin = first["target"].str.startswith("r_") & first["horizon_us"].isin(next_bucket)
    return first.loc[~twin, "target"].tolist()
