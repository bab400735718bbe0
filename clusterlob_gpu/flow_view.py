"""The tables of one symbol of a taker-flow run, and the short names of its signals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from clusterlob_gpu.flow_evaluation import LARGE, SMALL, TOTAL

NAMES = {LARGE: "large", SMALL: "small", TOTAL: "total"}


@dataclass(frozen=True)
class FlowView:
    """The tables of one symbol and what is said of all of them."""

    symbol: str
    info: dict[str, Any]
    """run.json"""
    tables: dict[str, pd.DataFrame]
    tests: dict[str, int]
    """By table, the rows of all symbols together for which p was corrected."""

    @property
    def targets(self) -> list[str]:
        """Targets by rising horizon."""
        rows = self.tables["ic"].drop_duplicates("target")
        return rows.sort_values("horizon_us", kind="stable")["target"].tolist()

    @property
    def target(self) -> str:
        """The one that the run asks about: the longest horizon."""
        return self.targets[-1]

    @property
    def horizon_us(self) -> int:
        return int(self.tables["ic"]["horizon_us"].max())

    def rows(self, table: str, **keys: object) -> pd.DataFrame:
        """Rows of a table whose columns have these values."""
        found = self.tables[table]
        for name, value in keys.items():
            found = found[found[name] == value]
        return found


def signal_name(signal: str) -> str:
    """Short text of a signal: `large, 3h sum`."""
    for factor, name in NAMES.items():
        if signal.startswith(factor):
            rest = signal.removeprefix(factor).removeprefix("_")
            return f"{name}, {kind_name(rest)}" if rest else name
    return signal.replace("_", " ")


def kind_name(suffix: str) -> str:
    """Short text of a kind of sum: `3h sum`."""
    return f"{suffix.removeprefix('sum_')} sum" if suffix.startswith("sum_") else suffix
