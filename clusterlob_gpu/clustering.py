"""K-means over days, names for its clusters, and the model that labels new days.

The fit is Lloyd's algorithm as a map over days and a small reduce of float64 sums and counts.  Sums
are made per day in row order and added in day order, so the result does not depend on the number of
workers.  All engines start from the same centres (`starts`).

A day's z-scores are (6, n) float32 with columns apart, in the order of `Z_FEATURES`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import pandas as pd
from annotated_types import Len
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError, model_validator

from clusterlob_gpu.backend import CPU, Backend
from clusterlob_gpu.errors import InputError
from clusterlob_gpu.schema import FEATURES, Z_FEATURES

SHIFT_TOLERANCE = 1e-8
"""Lloyd ends when the squared shift of all centres together is at most this."""

MAX_PASSES = 300

PASSIVE, OPPORTUNISTIC, DIRECTIONAL = 0, 1, 2


@dataclass(frozen=True)
class Bounds:
    """Per-feature clipping bounds of z, float64 of length 6; infinite where z is not clipped."""

    low: np.ndarray
    high: np.ndarray

    @classmethod
    def none(cls) -> Self:
        """Bounds that clip nothing."""
        return cls(np.full(len(Z_FEATURES), -np.inf), np.full(len(Z_FEATURES), np.inf))

    def clip(self, z: Any, on: Backend = CPU) -> Any:
        """z (6, n) with every column clipped."""
        out = on.xp.empty_like(z)
        on.kernels.clip_columns(z, self.low, self.high, out)
        return out


@dataclass(frozen=True)
class Partial:
    """One day's share of a Lloyd pass."""

    sums: np.ndarray
    counts: np.ndarray
    inertia: float


@dataclass(frozen=True)
class Fit:
    """Centres (k, 6) float64, in no particular order, and how they were reached."""

    centroids: np.ndarray
    counts: np.ndarray
    inertia: float
    passes: int
    converged: bool


def partial(z: Any, bounds: Bounds, centroids: np.ndarray, on: Backend = CPU) -> Partial:
    """One Lloyd pass over one day; rows with a NaN count nowhere."""
    sums = np.zeros_like(centroids)
    counts = np.zeros(len(centroids), np.int64)
    inertia = on.kernels.lloyd_partial(z, bounds.low, bounds.high, centroids, sums, counts)
    return Partial(sums, counts, inertia)


def lloyd(centroids: np.ndarray, one_pass: Callable[[np.ndarray], Sequence[Partial]]) -> Fit:
    """`lloyd_together` of a single fit."""
    return lloyd_together([centroids], lambda held: {0: one_pass(held[0])})[0]


def lloyd_together(
    starts: Sequence[np.ndarray], one_pass: Callable[[dict[int, np.ndarray]], Mapping[int, Sequence[Partial]]]
) -> list[Fit]:
    """Lloyd's algorithm from each of `starts` ((k, 6), k may differ), every fit in the same passes.

    `one_pass` is given the centroids of the fits that still move, by number, and gives for each the
    partials of its days in day order.  A centre without rows stays where it is.
    """
    moving, fits = dict(enumerate(starts)), dict[int, Fit]()
    for passes in range(1, MAX_PASSES + 1):
        if not moving:
            break
        parts = one_pass(moving)
        for number in list(moving):
            fit, shift = _moved(moving[number], parts[number], passes)
            moving[number] = fit.centroids
            if shift <= SHIFT_TOLERANCE or passes == MAX_PASSES:
                fits[number] = replace(fit, converged=shift <= SHIFT_TOLERANCE)
                del moving[number]
    return [fits[number] for number in range(len(starts))]


def _moved(centroids: np.ndarray, parts: Sequence[Partial], passes: int) -> tuple[Fit, float]:
    """The fit after a pass, and the squared shift of all its centres together."""
    counts = np.sum([part.counts for part in parts], axis=0)
    sums = np.zeros_like(centroids)
    for part in parts:
        sums += part.sums
    moved = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centroids)
    inertia = float(np.sum([part.inertia for part in parts]))
    return Fit(moved, counts, inertia, passes, False), float(((moved - centroids) ** 2).sum())


def known_rows(z: Any, on: Backend = CPU) -> Any:
    """z (6, n) without the rows that are NaN."""
    known = ~on.xp.isnan(z[0])
    return z if bool(known.all()) else z[:, known]


def fit_merged(z: Any, centroids: np.ndarray, on: Backend = CPU) -> Fit:
    """The same fit by the backend's library, on merged, clipped rows z (6, n) without NaN.

    Counts and inertia are those of one more pass from the centres that it gives.
    """
    centres, passes = on.kmeans(z, centroids, MAX_PASSES)
    last = partial(z, Bounds.none(), centres, on)
    return Fit(centres, last.counts, last.inertia, passes, passes < MAX_PASSES)


def scores(centroids: np.ndarray) -> np.ndarray:
    """z_sbs - z_obs of every centroid: how much thicker its own side is than the opposite one."""
    return centroids[:, FEATURES.index("sbs")] - centroids[:, FEATURES.index("obs")]


def roles(centroids: np.ndarray) -> np.ndarray:
    """Cluster number of every centroid by the naming rule.

    The largest score is 1, the smallest 2; of the rest the largest z_t_m is 0 and further ones are
    3, 4, ... by falling z_t_m.  Ties go to the first centroid in lexicographic order of its values.
    """
    k = len(centroids)
    first = np.lexsort(centroids.T[::-1])
    score, stable = scores(centroids), centroids[:, FEATURES.index("t_m")]
    role = np.full(k, -1)
    by_score = first[np.argsort(-score[first], kind="stable")]
    role[by_score[0]], role[by_score[-1]] = OPPORTUNISTIC, DIRECTIONAL
    rest = [c for c in first if role[c] < 0]
    rest.sort(key=lambda c: -stable[c])
    for number, c in zip([PASSIVE, *range(3, k)], rest, strict=False):
        role[c] = number
    return role


def cluster_numbers(k: int) -> list[int]:
    """Numbers that the naming rule gives out for k clusters, ascending."""
    return sorted([OPPORTUNISTIC, DIRECTIONAL, *([PASSIVE] if k > 2 else []), *range(3, k)])


def names(centroids: np.ndarray, numbers: Sequence[int], margin: float) -> list[str]:
    """Name of every cluster; a role whose score does not pass the margin is "unassigned"."""
    named = []
    for number, score in zip(numbers, scores(centroids), strict=True):
        if number == OPPORTUNISTIC:
            named.append("opportunistic" if score > margin else "unassigned")
        elif number == DIRECTIONAL:
            named.append("directional" if score < -margin else "unassigned")
        else:
            named.append("passive" if number == PASSIVE else f"other {number}")
    return named


def swap_sides(centroids: np.ndarray) -> np.ndarray:
    """The same centroids under the other side convention, which exchanges sbs and obs."""
    order = list(range(len(FEATURES)))
    same, opposite = FEATURES.index("sbs"), FEATURES.index("obs")
    order[same], order[opposite] = opposite, same
    return centroids[:, order]


def names_other_side(centroids: np.ndarray, margin: float) -> list[str]:
    """Name that every cluster would have under the other side convention."""
    swapped = swap_sides(centroids)
    return names(swapped, roles(swapped).tolist(), margin)


def high_counts(z: Any, on: Backend = CPU) -> np.ndarray:
    """Histogram (6, 65536) of the upper 16 bits of a day's z, in the order of the floats; NaN left out."""
    counts = np.zeros((len(z), 1 << 16), np.int64)
    for j, into in enumerate(counts):
        on.kernels.count_high_bits(z[j].view(np.uint32), into)
    return counts


def low_counts(z: Any, bins: np.ndarray, on: Backend = CPU) -> np.ndarray:
    """Histograms (6, m, 65536) of the lower 16 bits of the values in the bins (6, m)."""
    counts = np.zeros((*bins.shape, 1 << 16), np.int64)
    for j, (wanted, into) in enumerate(zip(bins, counts, strict=True)):
        for bin_, row in zip(wanted, into, strict=True):
            on.kernels.count_low_bits(z[j].view(np.uint32), bin_, row)
    return counts


def winsor_bounds(
    quantiles: tuple[float, float],
    high: np.ndarray,
    low_pass: Callable[[np.ndarray], np.ndarray],
) -> Bounds:
    """Exact quantiles (linear interpolation) of float32 z over many days, from counts that add up.

    `high` is the sum of the days' `high_counts`; `low_pass(bins)` gives the sum of their `low_counts`.
    """
    n = int(high[0].sum())
    position = np.array(quantiles) * (n - 1)
    lower = np.floor(position).astype(np.int64)
    ranks = np.concatenate([lower, np.minimum(lower + 1, n - 1)])
    bins, inside = _locate(high[:, None, :].repeat(len(ranks), axis=1), ranks)
    low, _ = _locate(low_pass(bins.astype(np.uint32)), inside)
    bits = (bins.astype(np.uint32) << np.uint32(16)) | low.astype(np.uint32)
    sign = bits >> np.uint32(31) == 1
    values = np.where(sign, bits & np.uint32(0x7FFFFFFF), ~bits).astype(np.uint32).view(np.float32)
    left, right = values.astype(np.float64).reshape(len(high), 2, 2).transpose(1, 0, 2)
    weight = position - lower
    # From the nearer end, as NumPy does.
    bounds = np.where(weight < 0.5, left + (right - left) * weight, right - (right - left) * (1 - weight))
    return Bounds(bounds[:, 0].copy(), bounds[:, 1].copy())


def _locate(counts: np.ndarray, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bin (6, m) in which each rank falls, and the rank inside it; counts are (6, m, bins)."""
    upto = counts.cumsum(axis=-1)
    ranks = np.broadcast_to(ranks, counts.shape[:2])
    bins = (upto <= ranks[..., None]).sum(axis=-1)
    before = np.take_along_axis(upto - counts, bins[..., None], axis=-1)[..., 0]
    return bins, ranks - before


def interpret(centroids: np.ndarray, same_side: str) -> list[str]:
    """What each centroid says in words: features more than a third of a deviation from the mean."""
    near, far = ("own", "opposite") if same_side == "own" else ("consumed", "other")
    words = {
        "v_rel": ("large against the touch", "small against the touch"),
        "sbs": (f"thick {near} side", f"thin {near} side"),
        "obs": (f"thick {far} side", f"thin {far} side"),
        "spread": ("wide spread", "tight spread"),
        "t_m": ("after long mid stability", "soon after a mid move"),
        "t_age": ("old best price", "fresh best price"),
    }
    found = []
    for centroid in centroids:
        strongest = np.argsort(-np.abs(centroid), kind="stable")
        said = [words[FEATURES[j]][int(centroid[j] < 0)] for j in strongest if abs(centroid[j]) > 1 / 3]
        found.append(", ".join(said) or "near the average trade")
    return found


@dataclass(frozen=True)
class Model:
    """A fitted clustering of one symbol: enough to label new days without fitting."""

    symbol: str
    exchange: str
    centroids: np.ndarray
    """(k, 6) float64, in the order of `numbers`."""
    numbers: list[int]
    labels: list[str]
    bounds: Bounds
    train_days: list[str]
    features: dict[str, Any]
    """The config fields that the features depend on."""
    fitted: dict[str, Any]
    """The config fields that the fit depends on besides."""
    margin: float = 0.0
    fit: dict[str, Any] = field(default_factory=dict)

    def label(self, z: Any, on: Backend = CPU) -> Any:
        """Position in `numbers` of every row of z (6, n): the nearest centroid, the first at ties.

        int8, NO_CLUSTER for a row with a NaN.
        """
        label = on.xp.empty(z.shape[1], np.int8)
        on.kernels.nearest_centroid(z, self.bounds.low, self.bounds.high, self.centroids, label)
        return label

    def as_json(self) -> dict[str, Any]:
        """Plain values; infinite bounds are left out."""
        values = asdict(self) | {"centroids": self.centroids.tolist(), "feature_order": list(Z_FEATURES)}
        clipped = bool(np.isfinite(self.bounds.low).all())
        bounds = {"low": self.bounds.low.tolist(), "high": self.bounds.high.tolist()}
        return values | {"bounds": bounds if clipped else None}

    @classmethod
    def from_json(cls, values: object, where: str) -> Self:
        """The inverse of `as_json`; raises InputError naming the file, the field and what is wrong."""
        try:
            held = _ModelFile.model_validate(values)
        except ValidationError as error:
            problem = error.errors()[0]
            at = ".".join(str(part) for part in problem["loc"])
            raise InputError(
                f"{where}: {at or 'model'}: {problem['msg']}; take a model.json of a run"
            ) from None
        plain = held.model_dump(exclude={"feature_order", "centroids", "bounds"})
        clip = held.bounds
        bounds = Bounds(np.array(clip["low"]), np.array(clip["high"])) if clip else Bounds.none()
        return cls(centroids=np.array(held.centroids), bounds=bounds, **plain)


_SixValues = Annotated[list[FiniteFloat], Len(len(Z_FEATURES), len(Z_FEATURES))]


class _ModelFile(BaseModel):
    """What a model in model.json must look like before any kernel sees it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    symbol: str
    exchange: str
    centroids: list[_SixValues]
    feature_order: list[str]
    numbers: list[int]
    labels: list[str]
    bounds: dict[Literal["low", "high"], _SixValues] | None
    train_days: list[str]
    features: dict[str, Any]
    fitted: dict[str, Any]
    margin: float
    fit: dict[str, Any]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        k = len(self.centroids)
        if tuple(self.feature_order) != Z_FEATURES:
            raise ValueError(f"feature_order must be {', '.join(Z_FEATURES)}")
        if k < 2 or sorted(self.numbers) != cluster_numbers(k) or len(self.labels) != k:
            raise ValueError(f"{k} centroids need numbers {cluster_numbers(k)} and as many labels")
        if self.bounds is not None and set(self.bounds) != {"low", "high"}:
            raise ValueError("bounds must have low and high")
        return self


def make_model(fit: Fit, margin: float, bounds: Bounds, **where: Any) -> Model:
    """Name the clusters of a fit and put them in the order of their numbers."""
    role = roles(fit.centroids)
    order = np.argsort(role, kind="stable")
    centroids, numbers = fit.centroids[order], role[order].tolist()
    how = {"inertia": fit.inertia, "passes": fit.passes, "converged": fit.converged}
    labels = names(centroids, numbers, margin)
    counts = [int(count) for count in fit.counts[order]]
    return Model(
        centroids=centroids,
        numbers=numbers,
        labels=labels,
        bounds=bounds,
        margin=margin,
        fit=how | {"counts": counts, "rows": sum(counts)},
        **where,
    )


def track(model: Model, previous: Model | None) -> pd.DataFrame:
    """Each cluster's match in the previous window: Hungarian assignment on centroid distance.

    Columns cluster, matched (number in the previous window), drift (Euclidean distance to it, in z),
    agrees (the match has the same number); nulls in the first window.
    """
    table = pd.DataFrame({"cluster": model.numbers})
    if previous is None or len(previous.numbers) != len(model.numbers):
        nothing = [None] * len(table)
        return table.assign(
            matched=pd.array(nothing, "Int64"), drift=np.nan, agrees=pd.array(nothing, "boolean")
        )
    from scipy.optimize import linear_sum_assignment

    distance = np.linalg.norm(model.centroids[:, None] - previous.centroids[None], axis=2)
    mine, theirs = linear_sum_assignment(distance)
    matched = np.array(previous.numbers)[theirs]
    return table.assign(
        matched=pd.array(matched, "Int64"),
        drift=distance[mine, theirs],
        agrees=pd.array(matched == np.array(model.numbers), "boolean"),
    )


def write_models(models: Sequence[Model], path: Path) -> None:
    """Write model.json, one entry per symbol."""
    text = json.dumps({"version": 1, "models": [model.as_json() for model in models]}, indent=1)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def read_models(path: Path) -> dict[str, Model]:
    """Models of a model.json by symbol; raises InputError naming the file and what is wrong."""
    try:
        content = json.loads(path.read_text())
        entries = content["models"]
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: not a model.json; take the one that `run cluster` wrote") from None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: holds no model; take the model.json of a run")
    models = [Model.from_json(entry, str(path)) for entry in entries]
    return {model.symbol: model for model in models}
