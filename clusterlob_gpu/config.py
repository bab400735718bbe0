"""The configuration of a run: one frozen, validated model per experiment.

Durations read `10s`, `5m`, `72h`, `1d` (also `250ms`, `100us`) and are held in microseconds.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import date
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from clusterlob_gpu.errors import ConfigError, InputError
from clusterlob_gpu.schema import US_PER_DAY, US_PER_SECOND

_UNITS_US = {
    "us": 1,
    "ms": 1_000,
    "s": US_PER_SECOND,
    "m": 60 * US_PER_SECOND,
    "h": 3600 * US_PER_SECOND,
    "d": US_PER_DAY,
}


MAX_DURATION_US = 366 * US_PER_DAY


def parse_duration(value: object) -> int:
    """Microseconds of a duration such as `10s`, `5m`, `72h`, `1d`; raises ValueError otherwise."""
    match = re.fullmatch(r"(\d{1,18})(us|ms|s|m|h|d)", str(value).strip())
    us = int(match[1]) * _UNITS_US[match[2]] if match else 0
    if not 0 < us <= MAX_DURATION_US:
        raise ValueError("must be a positive duration such as 10s, 5m, 72h or 1d, at most 366d")
    return us


def format_duration(us: int) -> str:
    """Shortest text of a duration: 300000000 is `5m`."""
    unit = next(name for name in ("d", "h", "m", "s", "ms", "us") if us % _UNITS_US[name] == 0)
    return f"{us // _UNITS_US[unit]}{unit}"


Duration = Annotated[int, BeforeValidator(parse_duration), PlainSerializer(format_duration, return_type=str)]


def _require_bars(field: str, width: int) -> None:
    if width < US_PER_SECOND or US_PER_DAY % width:
        raise ValueError(f"{field} = {format_duration(width)}: must divide a UTC day and be at least 1s")


class RunConfig(BaseModel):
    """Settings of every experiment; a field is a key of the config file and of `--set`."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    book: Literal["book_snapshot_25", "quotes"] = "book_snapshot_25"
    """Table that gives the book; `quotes` has one level of depth."""

    depth: int = Field(default=5, ge=1, le=25)
    """Levels summed into the depth of a side."""

    max_staleness: Duration = "60s"  # type: ignore[assignment]
    """A book row older than this gives no context and no mid."""

    seed: int = Field(default=7, ge=0, lt=2**32)
    """Seed of everything that is drawn."""

    on_bad_day: Literal["fail", "skip"] = "fail"
    """A day of the range without trades or book: stop, or leave its buckets null."""

    def resolved(self) -> dict[str, Any]:
        """Plain values, durations as text: what run.json records."""
        return self.model_dump(mode="json")


Config = TypeVar("Config", bound=RunConfig, covariant=True)


class ClusterConfig(RunConfig):
    """Settings of `run cluster`."""

    window: int = Field(100, ge=2, le=100_000)
    """Trades in the rolling z-score, the current one included."""

    same_side: Literal["own", "consumed"] = "own"
    """Whether sbs is the depth on the taker's own side or on the side that the trade hits."""

    spread: Literal["ticks", "bps"] = "ticks"
    """Unit of the spread; bps only to compare with older work (with a pinned spread it is -z(mid))."""

    asof: Literal["strict", "inclusive"] = "strict"
    """strict: a trade sees book rows before its own time; inclusive leaks, for comparison only."""

    k: int = Field(3, ge=2, le=64)
    """Number of clusters."""

    n_init: int = Field(5, ge=1)
    """Starts of k-means++ on the sample; the best one is fitted on all rows."""

    engine: Literal["auto", "sklearn", "cuml", "cuml_dask", "lloyd"] = "auto"
    """Who fits; auto is lloyd, the exact map-reduce over days."""

    margin: float = Field(0.0, ge=0.0, allow_inf_nan=False)
    """Least |z_sbs - z_obs| of a centroid that may be called opportunistic or directional."""

    winsorize: tuple[float, float] | None = None
    """Quantiles of the training days at which z is clipped before fitting and labelling."""

    bucket: Duration = "5m"  # type: ignore[assignment]
    """Width of the buckets of order-flow imbalance."""

    horizons: tuple[Duration, ...] = ("5m", "15m", "1h")  # type: ignore[assignment]
    """Horizons h of r_h(b) = ln mid(b + w + h) / mid(b + w)."""

    keep_trades: bool = False
    """Write the features and the cluster of every trade."""

    train_days: int | None = Field(None, ge=1)
    """Walk-forward: days of each fit; null fits and labels the same days (in sample)."""

    test_days: int = Field(1, ge=1)
    """Walk-forward: days labelled by each fit."""

    step_days: int = Field(1, ge=1)
    """Walk-forward: days between fits."""

    purge: Duration | None = None
    """Walk-forward: end of the training days that is left out; null is bucket + longest horizon."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _require_bars("bucket", self.bucket)
        if not self.horizons or len(set(self.horizons)) != len(self.horizons):
            raise ValueError(f"horizons = {self.horizons}: give one or more, each once")
        if self.winsorize and not 0 <= self.winsorize[0] < self.winsorize[1] <= 1:
            raise ValueError(f"winsorize = {self.winsorize}: must be [lo, hi] with 0 <= lo < hi <= 1")
        if self.train_days is not None and self.step_days < self.test_days:
            raise ValueError(
                f"step_days = {self.step_days}: must be at least test_days = {self.test_days}, "
                "or a bucket would be tested twice"
            )
        if self.train_days is not None and self.purge_us >= self.train_days * US_PER_DAY:
            raise ValueError(
                f"train_days = {self.train_days}: the purge of {format_duration(self.purge_us)} leaves no "
                "training day; train longer or shorten purge"
            )
        longest = max(self.horizons)
        if self.purge is not None and self.purge < longest:
            raise ValueError(
                f"purge = {format_duration(self.purge)}: must be at least the longest horizon, "
                f"{format_duration(longest)}"
            )
        return self

    @property
    def reach(self) -> int:
        """How far the targets of a bucket look past its start: bucket + longest horizon (us)."""
        return self.bucket + max(*self.horizons, self.bucket)

    @property
    def purge_us(self) -> int:
        """End of the training days that a walk-forward fit leaves out (us)."""
        return self.reach if self.purge is None else self.purge


class FlowConfig(RunConfig):
    """Settings of `run flow`."""

    bar: Duration = "5m"  # type: ignore[assignment]
    """Width of the bars."""

    quantiles: tuple[float, float] = (0.85, 0.5)
    """Large: at or above the first quantile of notionals.  Small: at or below the second."""

    threshold_window: Duration = "72h"  # type: ignore[assignment]
    """Trailing window of the quantiles."""

    refresh: Literal["day", "bar"] = "day"
    """How often the quantiles are taken anew."""

    min_trades: int = Field(default=5000, ge=1)
    """Fewer trades in the window give no threshold."""

    require_full_window: bool = False
    """No threshold where the window touches a day that the lake does not have."""

    variants: tuple[tuple[Duration, float, float], ...] = ()
    """Further settings [window, large quantile, small quantile], tested beside the main one."""

    unit: Literal["trade", "order"] = "trade"
    """Trades as given, or taker orders rebuilt from their fills."""

    price: Literal["mid", "vwap"] = "mid"
    """Price of the targets and of past returns."""

    horizons: tuple[Duration, ...] = ("1h", "3h")  # type: ignore[assignment]
    """Horizons of the targets."""

    controls: tuple[str, ...] | None = None
    """Control columns of the regressions; null takes all."""

    markets: tuple[str, ...] = ("BTCUSDT", "ETHUSDT")
    """Symbols of the same exchange whose past return is a control, where the lake has them."""

    fee_bps: float = Field(default=5.0, ge=0, allow_inf_nan=False)
    """Taker fee per side, bps of the traded notional."""

    slippage_bps: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Slippage per side beyond half the spread."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _require_bars("bar", self.bar)
        if not self.horizons or len(set(self.horizons)) != len(self.horizons):
            raise ValueError(f"horizons = {self.horizons}: give one or more, each once")
        uneven = [h for h in self.horizons if h % self.bar]
        if uneven:
            first, bar = format_duration(uneven[0]), format_duration(self.bar)
            raise ValueError(f"horizons: {first} is not a multiple of bar = {bar}")
        if len(set(self.settings)) < len(self.settings):
            raise ValueError("variants: each setting once, and none like the main one")
        for _, large, small in self.settings:
            if not 0 < small <= large < 1:
                raise ValueError(
                    f"quantiles = [{large}, {small}]: must be [large, small] with 0 < small <= large < 1"
                )
        return self

    @property
    def settings(self) -> list[tuple[int, float, float]]:
        """The main (window, large quantile, small quantile), then the variants."""
        return [(self.threshold_window, *self.quantiles), *self.variants]


def make_config(
    file: Mapping[str, Any],
    settings: Sequence[str] = (),
    kind: type[Config] = ClusterConfig,  # type: ignore[assignment]
) -> Config:
    """The config of a file's keys with `key=value` settings on top (values are YAML).

    Raises ConfigError naming the field, what was found and what is allowed.
    """
    values = dict(file)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting}: must be key=value")
        try:
            values[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set {setting}: {text!r} is not a YAML value") from None
    try:
        return kind(**values)
    except ValidationError as error:
        raise ConfigError(first_problem(error, kind)) from None


def first_problem(error: ValidationError, kind: type[BaseModel]) -> str:
    """One line about the first thing that a model refuses: field, value, rule."""
    problem = error.errors()[0]
    field = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{field}: no such key; known keys are {', '.join(kind.model_fields)}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{field} = {problem['input']!r}: {message}" if field else message


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping; raises ConfigError naming the file."""
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold keys and values, found a {type(values).__name__}")
    if not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path}: every key must be text, such as `k: 3`")
    return values


class Preset(BaseModel):
    """An experiment worth repeating: where, when, with which config, and what was published of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    experiment: Literal["cluster", "flow"]
    exchange: str
    symbols: tuple[str, ...]
    start: date
    end: date
    config: dict[str, Any] = {}
    published: dict[str, Any] | None = None


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    folder = resources.files("clusterlob_gpu") / "presets"
    return sorted(
        entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def read_preset(name: str) -> Preset:
    """The preset of that name; raises InputError with the names that exist."""
    if name not in preset_names():
        raise InputError(f"--preset {name}: no such preset; there are {', '.join(preset_names())}")
    with resources.as_file(resources.files("clusterlob_gpu") / "presets" / f"{name}.yaml") as path:
        try:
            return Preset(**read_yaml(path))
        except ValidationError as error:
            raise ConfigError(f"preset {name}: {first_problem(error, Preset)}") from None


def config_hash(values: Mapping[str, Any]) -> str:
    """First 16 hex digits of the SHA-256 of the canonical JSON."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
