"""The trials of a sweep: points of a grid or of a list, and the families that share their features."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clusterlob_gpu.config import (
    ClusterConfig,
    FlowConfig,
    RunConfig,
    config_hash,
    first_problem,
    make_config,
    read_yaml,
)
from clusterlob_gpu.errors import ConfigError
from clusterlob_gpu.pipeline.parts import FEATURE_KEYS
from clusterlob_gpu.pipeline.trials import Evaluated

Kind = Literal["cluster", "flow"]
CONFIGS: dict[str, type[RunConfig]] = {"cluster": ClusterConfig, "flow": FlowConfig}
OWN_OF_FLOW = {
    "quantiles",
    "threshold_window",
    "variants",
    "horizons",
    "controls",
    "fee_bps",
    "slippage_bps",
    "seed",
}
"""Settings in which the trials of one family of the taker-flow experiment may differ."""


class SweepFile(BaseModel):
    """A sweep as its file describes it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    experiments: tuple[Kind, ...] = Field(("cluster",), min_length=1)
    """What every trial runs; a setting goes to the experiments that know it."""
    exchange: str
    symbols: tuple[str, ...] = Field(min_length=1)
    start: date
    end: date
    config: dict[str, Any] = {}
    """Settings that all trials share."""
    grid: dict[str, list[Any]] = {}
    """Values by key; every combination is a trial.  The key `symbols` takes lists of symbols."""
    trials: list[dict[str, Any]] = []
    """Further trials, each a set of keys and values."""


@dataclass(frozen=True)
class Trial:
    """One point of a sweep."""

    number: int
    settings: Mapping[str, Any]
    """What the grid or the list gives it."""
    symbols: tuple[str, ...]
    configs: Mapping[str, RunConfig]
    """Its config by experiment; none where the settings are not valid."""
    problem: str | None = None

    @property
    def id(self) -> str:
        """Hash of its number and of what it computes."""
        held = {name: config.resolved() for name, config in self.configs.items()}
        return config_hash({"n": self.number, "settings": self.settings, "s": self.symbols, "c": held})


def read_sweep(path: Path) -> SweepFile:
    """A sweep file; raises ConfigError naming the file and the field."""
    try:
        file = SweepFile(**read_yaml(path))
    except ValidationError as error:
        raise ConfigError(f"{path}: {first_problem(error, SweepFile)}") from None
    known = {"symbols"}.union(*(CONFIGS[name].model_fields for name in file.experiments))
    used = [*file.config, *file.grid, *(key for trial in file.trials for key in trial)]
    unknown = [key for key in used if key not in known]
    if unknown:
        raise ConfigError(f"{path}: {unknown[0]}: no such key of {' or '.join(file.experiments)}")
    empty = [key for key, values in file.grid.items() if not values]
    if empty:
        raise ConfigError(f"{path}: grid.{empty[0]}: has no values")
    return file


def make_trials(file: SweepFile) -> list[Trial]:
    """Every trial of a sweep, the grid first, in the order of its keys and values."""
    points: list[dict[str, Any]] = []
    if file.grid or not file.trials:
        points += [
            dict(zip(file.grid, values, strict=True)) for values in itertools.product(*file.grid.values())
        ]
    points += file.trials
    return [_trial(file, number, point) for number, point in enumerate(points)]


def _trial(file: SweepFile, number: int, point: Mapping[str, Any]) -> Trial:
    symbols = point.get("symbols", file.symbols)
    symbols = (symbols,) if isinstance(symbols, str) else tuple(symbols)
    settings = {**file.config, **{key: value for key, value in point.items() if key != "symbols"}}
    configs: dict[str, RunConfig] = {}
    problem = None
    try:
        if len(set(symbols)) < len(symbols):
            raise ConfigError(f"symbols = {list(symbols)}: each once")
        for name in file.experiments:
            kind = CONFIGS[name]
            mine = {key: value for key, value in settings.items() if key in kind.model_fields}
            configs[name] = make_config(mine, (), kind)
    except ConfigError as error:
        configs, problem = {}, str(error)
    return Trial(number, point, symbols, configs, problem)


class Key(NamedTuple):
    """An evaluation: what trials that differ in nothing that the experiment looks at share."""

    experiment: str
    config: str
    """Hash of the config."""
    symbol: str


@dataclass(frozen=True)
class Family:
    """Configs of one experiment that share their features, and the symbols that trials ask of them."""

    experiment: str
    asked: dict[Key, RunConfig] = field(default_factory=dict)
    """Config of every evaluation that some trial asks for."""

    @property
    def configs(self) -> list[RunConfig]:
        """Every config once."""
        return list({key.config: config for key, config in self.asked.items()}.values())

    @property
    def symbols(self) -> list[str]:
        """Every symbol once."""
        return list(dict.fromkeys(key.symbol for key in self.asked))

    def parted(self) -> list[Family]:
        """A family for every config; for every symbol where there is one config."""
        by = "config" if len(self.configs) > 1 else "symbol"
        parts: dict[str, Family] = {}
        for key, config in self.asked.items():
            parts.setdefault(getattr(key, by), Family(self.experiment)).asked[key] = config
        return list(parts.values())

    def without(self, results: Results) -> Family:
        """The evaluations that have no result yet."""
        return Family(self.experiment, {k: config for k, config in self.asked.items() if k not in results})


def families(made: Sequence[Trial]) -> list[Family]:
    """The families of the trials, in the order of their first trials."""
    found: dict[str, Family] = {}
    for trial in made:
        for experiment, config in trial.configs.items():
            family = found.setdefault(_family_key(experiment, config), Family(experiment))
            for name in trial.symbols:
                family.asked[Key(experiment, config_hash(config.resolved()), name)] = config
    return list(found.values())


def _family_key(experiment: str, config: RunConfig) -> str:
    if experiment == "cluster":
        kept = config.model_dump(mode="json", include={*FEATURE_KEYS, "on_bad_day"})
    else:
        kept = config.model_dump(mode="json", exclude=OWN_OF_FLOW)
    return config_hash({"experiment": experiment, "config": kept})


Results = dict[Key, Evaluated]
