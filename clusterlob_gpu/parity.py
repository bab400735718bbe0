"""Whether two backends compute the same: the same days on both, compared within the tolerances.

Features agree to 1e-6 of their size, centroids to 1e-3 once clusters are matched by number, 99.9 % of the
labels are equal, order-flow imbalance agrees to 1e-6 where all labels of a bucket do, IC to 1e-3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd

from clusterlob_gpu.backend import Name
from clusterlob_gpu.config import ClusterConfig, FlowConfig, RunConfig, make_config
from clusterlob_gpu.errors import ClusterlobError
from clusterlob_gpu.files import Location
from clusterlob_gpu.pipeline.cluster import CLUSTER
from clusterlob_gpu.pipeline.flow import FLOW
from clusterlob_gpu.pipeline.run import RunRequest, execute
from clusterlob_gpu.places import ThreadsPlace
from clusterlob_gpu.schema import ALL_CLUSTERS, FEATURES, Z_FEATURES
from clusterlob_gpu.workers import open_workers, read_place

_FEATURES, _CENTROIDS, _LABELS, _FLOW, _IC = 1e-6, 1e-3, 1e-3, 1e-6, 1e-3
_KEYS = ("symbol", "window_id", "cluster", "bucket_ts", "bar_ts", "signal", "target", "horizon")


@dataclass(frozen=True)
class Difference:
    """How far one quantity of two runs is apart, and how far it may be."""

    quantity: str
    rows: int
    """Values compared."""
    found: float
    """Largest difference (of labels: the share that differ)."""
    allowed: float

    @property
    def ok(self) -> bool:
        return self.found <= self.allowed


@dataclass(frozen=True)
class Day:
    """What is computed on both backends."""

    lake: Path | Location
    exchange: str
    symbol: str
    first: date
    last: date

    def run(self, config: RunConfig, machine: Name, out: Path) -> Path:
        """Run the config's experiment on a backend in this process, and give its folder."""
        request = RunRequest(
            lake=self.lake,
            exchange=self.exchange,
            symbols=(self.symbol,),
            start=self.first,
            end=self.last,
            out=out / machine / "run",
            config=config,
            pictures=False,
            backend=machine,
        )
        experiment: Any = FLOW if isinstance(config, FlowConfig) else CLUSTER
        place = read_place(None) if machine == "cpu" else ThreadsPlace(n_workers=1)
        with open_workers(place, lambda *_: None) as workers:
            return execute(request, experiment, workers)


def check(days: Day, file: Mapping[str, Any], settings: Sequence[str], out: Path) -> list[Difference]:
    """Differences of both experiments between the CPU and the GPU, computed below `out`.

    Settings go to the experiment that knows them; raises ConfigError for one that neither knows.
    """
    found = []
    for kind, compare in ((ClusterConfig, compare_cluster), (FlowConfig, compare_flow)):
        config = make_config(*_known(kind, file, settings), kind)
        if kind is ClusterConfig:
            config = config.model_copy(update={"keep_trades": True})
        runs = (days.run(config, machine, out / kind.__name__) for machine in get_args(Name))
        found += compare(*runs)
    return found


def _known(
    kind: type[RunConfig], file: Mapping[str, Any], settings: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """The settings that a kind of config knows, and those that no kind does, so that it complains."""
    others = {*ClusterConfig.model_fields, *FlowConfig.model_fields} - set(kind.model_fields)
    mine = {key: value for key, value in file.items() if key not in others}
    return mine, [setting for setting in settings if setting.partition("=")[0].strip() not in others]


def compare_cluster(one: Path, other: Path) -> list[Difference]:
    """Differences of two finished runs of ClusterLOB on the same days, with keep_trades.

    Raises ClusterlobError where they do not even have the same trades.
    """
    trades = [_trades(out) for out in (one, other)]
    if not trades[0][["ts_local_us", "sign", "price", "qty"]].equals(
        trades[1][["ts_local_us", "sign", "price", "qty"]]
    ):
        raise ClusterlobError(f"{one} and {other} kept different trades ({len(trades[0])}, {len(trades[1])})")
    found = [_apart(name, trades[0][name], trades[1][name], _FEATURES) for name in (*FEATURES, *Z_FEATURES)]
    differ = (trades[0]["cluster"] != trades[1]["cluster"]).to_numpy()
    found.append(Difference("labels", len(differ), float(differ.mean()) if len(differ) else 0.0, _LABELS))
    centroids = _joined(one, other, "centroids")
    found += [
        _apart(f"centroid {name}", *_pair(centroids, name), _CENTROIDS, relative=False) for name in Z_FEATURES
    ]
    buckets = _joined(one, other, "buckets")
    width = int(np.diff(np.unique(buckets["bucket_ts"])).min()) if len(buckets) > 1 else 1
    touched = np.unique(trades[0]["ts_local_us"].to_numpy()[differ] // width * width)
    same = (buckets["cluster"] == ALL_CLUSTERS) | ~buckets["bucket_ts"].isin(touched)
    for name in ("n_trades", "ofi_size", "ofi_count", "ofi_notional", "conr", "frnb", "freb"):
        found.append(_apart(name, *_pair(buckets[same], name), _FLOW))
    return [*found, _apart("ic", *_pair(_joined(one, other, "ic"), "ic"), _IC, relative=False)]


def compare_flow(one: Path, other: Path) -> list[Difference]:
    """Differences of two finished runs of taker flow on the same days."""
    bars = _joined(one, other, "features")
    numbers = [str(name).removesuffix("_x") for name in bars if str(name).endswith("_x")]
    found = [
        _apart(f"bar {name}", *_pair(bars, name), _FLOW)
        for name in numbers
        if pd.api.types.is_numeric_dtype(bars[f"{name}_x"])
    ]
    return [*found, _apart("flow ic", *_pair(_joined(one, other, "ic"), "ic"), _IC, relative=False)]


def _trades(out: Path) -> pd.DataFrame:
    folder = out / "results" / "trade_features.parquet"
    return pd.concat([pd.read_parquet(path) for path in sorted(folder.glob("*.parquet"))], ignore_index=True)


def _joined(one: Path, other: Path, table: str) -> pd.DataFrame:
    """Both runs' rows of a table, matched by their keys; raises ClusterlobError where one has others."""
    first, second = (pd.read_parquet(out / "results" / f"{table}.parquet") for out in (one, other))
    keys = [name for name in _KEYS if name in first]
    both = first.merge(second, on=keys, how="outer", indicator=True, validate="one_to_one")
    if not both.pop("_merge").eq("both").all():
        raise ClusterlobError(f"{one} and {other} have different rows of {table}")
    return both


def _pair(table: pd.DataFrame, name: str) -> tuple[pd.Series, pd.Series]:
    return table[f"{name}_x"], table[f"{name}_y"]


def _apart(
    quantity: str, one: pd.Series, other: pd.Series, allowed: float, *, relative: bool = True
) -> Difference:
    """Largest |a - b|, if `relative` over max(1, |a|); infinite where only one of the two is null."""
    a, b = (values.to_numpy(np.float64) for values in (one, other))
    missing = np.isnan(a), np.isnan(b)
    if (missing[0] != missing[1]).any():
        return Difference(quantity, len(a), np.inf, allowed)
    gap = np.abs(a - b)[~missing[0]]
    if relative:
        gap = gap / np.maximum(1.0, np.abs(a[~missing[0]]))
    return Difference(quantity, len(gap), float(gap.max(initial=0.0)), allowed)
