"""The evaluation of one symbol under one config, as a task: what a sweep asks of its workers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from clusterlob_gpu import (
    bars,
    cluster_days,
    clustering,
    controls,
    days,
    evaluation,
    flow_bars,
    flow_days,
    flow_evaluation,
    returns,
)
from clusterlob_gpu.days import symbol_folder
from clusterlob_gpu.errors import ClusterlobError
from clusterlob_gpu.pipeline import flow, parts
from clusterlob_gpu.pipeline.flow import FlowPart
from clusterlob_gpu.pipeline.parts import Part
from clusterlob_gpu.store import Artefact, Made, Store, read_frame, source_hash

CLUSTER_CODE = source_hash(str(parts.__file__), [bars, cluster_days, clustering, days, evaluation, returns])
FLOW_CODE = source_hash(
    str(flow.__file__), [controls, evaluation, flow_bars, flow_days, flow_evaluation, returns]
)


@dataclass(frozen=True)
class Evaluated:
    """An evaluation: where it is, or why there is none."""

    made: Made | None
    problem: str | None = None

    def ic(self, store: Store) -> pd.DataFrame:
        """The IC table of the symbol; empty where there is none."""
        if self.made is None:
            return pd.DataFrame()
        return read_frame(store.folder(self.made.address) / "ic.parquet")


def evaluation_artefact(part: Part | FlowPart) -> Artefact | None:
    """Name of an evaluation: of everything that it looks at, and of its settings."""
    if isinstance(part, FlowPart):
        return _flow_artefact(part)
    return None if part.problem is not None else _cluster_artefact(part)


def _cluster_artefact(part: Part) -> Artefact:
    windows = part.fitted
    inputs: dict[str, Any] = {
        "code": CLUSTER_CODE,
        "labelled": [[day.made.address for day in part.labelled.get(w.id, [])] for w in windows],
        "models": [part.models[window.id].as_json() for window in windows],
        "test": [[window.id, [str(day) for day in window.test]] for window in windows],
        "mids": [mids.made.address for mids in part.mids],
        "config": part.config.resolved(),
    }
    return Artefact("evaluation", symbol_folder(part.exchange, part.symbol), _span(part), inputs)


def _span(part: Part) -> str:
    tested = [day for window in part.windows for day in window.test]
    return f"{min(tested)}..{max(tested)}"


def _flow_artefact(part: FlowPart) -> Artefact:
    config = part.config.resolved()
    for name in ("fee_bps", "slippage_bps", "controls"):  # no IC depends on them
        del config[name]
    inputs = {
        "code": FLOW_CODE,
        "bars": [[str(day), made.made.address if made else None] for day, made in part.bars],
        "setting": part.setting,
        "book": [state.made.address for state in part.book],
        "ticker": [state.made.address for state in part.ticker],
        "markets": {name: [s.made.address for s in states] for name, states in part.markets.items()},
        "price_unit": str(part.price_unit),
        "days": [str(day) for day in part.days],
        "config": config,
    }
    folder = symbol_folder(part.exchange, part.symbol)
    return Artefact("evaluation", folder, f"{part.days[0]}..{part.days[-1]}", inputs)


def evaluate(part: Part | FlowPart) -> Evaluated:
    """ICs of a symbol's signals under a config, kept in the store."""
    artefact = evaluation_artefact(part)
    if artefact is None:
        return Evaluated(None, str(part.problem) if isinstance(part, Part) else None)

    def fill(folder: Path) -> dict[str, Any]:
        _ic(part).to_parquet(folder / "ic.parquet", index=False)
        return {}

    try:
        return Evaluated(Store(part.store).make(artefact, fill).brief())
    except ClusterlobError as error:
        return Evaluated(None, str(error))


def _ic(part: Part | FlowPart) -> pd.DataFrame:
    if isinstance(part, FlowPart):
        return flow_evaluation.flow_ic(flow.part_bars(part), flow.flow_plan(part.config))
    tables = parts.part_tables(part, fitted=True)
    return parts.ic_of(part.config, tables["buckets"], tables["centroids"])
