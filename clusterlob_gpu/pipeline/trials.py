"""The evaluation of one symbol under one config, as a task: every table for a run, ICs alone for a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from clusterlob_gpu.days import symbol_folder
from clusterlob_gpu.errors import ClusterlobError, TasksFailed
from clusterlob_gpu.pipeline import flow_parts, parts
from clusterlob_gpu.pipeline.flow_parts import FlowPart
from clusterlob_gpu.pipeline.parts import Part
from clusterlob_gpu.pipeline.stages import Stages
from clusterlob_gpu.store import Artefact, Made, Store, read_frame
from clusterlob_gpu.versions import CODE_VERSION, computing_versions


@dataclass(frozen=True)
class Tables:
    """The result tables of a symbol: where they are."""

    made: Made

    def read(self, store: Store) -> dict[str, pd.DataFrame]:
        """The tables by name."""
        folder = store.folder(self.made.address)
        return {name: read_frame(folder / f"{name}.parquet") for name in self.made.record["tables"]}


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


def tables_of(made: Sequence[Part | FlowPart], stages: Stages) -> dict[str, pd.DataFrame]:
    """Result tables of all symbols by name, by the order of their names, each corrected alone."""
    ordered = sorted(made, key=lambda part: part.symbol)
    try:
        kept = stages.make("tables", tables_artefact, make_tables, ordered)
    except TasksFailed as failure:
        number, error = next(iter(failure.failed.items()))
        raise ClusterlobError(f"{ordered[number].symbol}: {error}") from None
    stages.end_of_plan()
    found = [tables.read(stages.store) for tables in kept]
    return {name: pd.concat([tables[name] for tables in found], ignore_index=True) for name in found[0]}


def tables_artefact(part: Part | FlowPart) -> Artefact:
    """Name of a symbol's tables: of everything that they are made of, and of its settings."""
    return _artefact("tables", part, part.config.resolved())


def make_tables(part: Part | FlowPart) -> Tables:
    """Every result table of a symbol, kept in the store."""

    def fill(folder: Path) -> dict[str, Any]:
        tables = _tables(part)
        for name, table in tables.items():
            table.to_parquet(folder / f"{name}.parquet", index=False)
        return {"tables": list(tables)}

    return Tables(Store(part.store).make(tables_artefact(part), fill))


def _tables(part: Part | FlowPart) -> dict[str, pd.DataFrame]:
    if isinstance(part, FlowPart):
        return flow_parts.part_tables(part)
    tables = parts.part_tables(part)
    return tables | {"ic": parts.ic_of(part.config, tables["buckets"], tables["centroids"])}


def evaluation_artefact(part: Part | FlowPart) -> Artefact | None:
    """Name of an evaluation: of everything that it looks at, and of its settings."""
    if isinstance(part, Part):
        return None if part.problem is not None else _artefact("evaluation", part, part.config.resolved())
    config = part.config.resolved()
    for name in ("fee_bps", "slippage_bps", "controls"):  # no IC depends on them
        del config[name]
    return _artefact("evaluation", part, config)


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
        return flow_parts.part_ic(part)
    return _tables(part)["ic"]


def _artefact(stage: str, part: Part | FlowPart, config: dict[str, Any]) -> Artefact:
    # Of the whole package: nearly all of it has a say in these tables, and they are soon made.
    code = {"code": CODE_VERSION, "libraries": computing_versions(), "config": config}
    inputs = _flow_inputs(part) if isinstance(part, FlowPart) else _cluster_inputs(part)
    return Artefact(stage, symbol_folder(part.exchange, part.symbol), _span(part), code | inputs)


def _cluster_inputs(part: Part) -> dict[str, Any]:
    windows = part.fitted
    return {
        "labelled": [[day.made.address for day in part.labelled.get(w.id, [])] for w in windows],
        "models": [part.models[window.id].as_json() for window in windows],
        "windows": [[w.id, [str(day) for day in w.train], [str(day) for day in w.test]] for w in windows],
        "mids": [mids.made.address for mids in part.mids],
    }


def _flow_inputs(part: FlowPart) -> dict[str, Any]:
    return {
        "bars": [[str(day), made.made.address if made else None] for day, made in part.bars],
        "setting": part.setting,
        "book": [state.made.address for state in part.book],
        "ticker": [state.made.address for state in part.ticker],
        "markets": {name: [s.made.address for s in states] for name, states in part.markets.items()},
        "price_unit": str(part.price_unit),
        "days": [str(day) for day in part.days],
    }


def _span(part: Part | FlowPart) -> str:
    days = part.days if isinstance(part, FlowPart) else [day for w in part.windows for day in w.test]
    return f"{min(days)}..{max(days)}"
