"""Passes for the GPU, under Numba's simulator, against those for the CPU.

It has no parallel hardware and does not join multiplications with additions: this says that indices,
orders and cuts are right, `test_ptx` that the kernels compile.
"""

from __future__ import annotations

import inspect
import math
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import standin
from standin.device import Device
from test_kernels import KINDS, column, ints, rolling_exact, sorted_times, unbounded, with_nulls

from clusterlob_gpu import kernels
from clusterlob_gpu.kernels import NO_CLUSTER, NO_LEVEL, NO_TIME

pytest.importorskip("numba_cuda")

SMALL = {"THREADS": 4, "MOST_BLOCKS": 3, "TEAM": 4, "PIECE": 16, "WIDEST": 8, "_SHARES": 2}
"""The simulator starts a thread of Python's for each of the device's."""

Rng = np.random.Generator
Case = tuple[Any, ...]


@dataclass(frozen=True)
class Host:
    """An argument that stays in the memory of the host on both machines."""

    array: np.ndarray


_allocating = threading.Lock()


def shared_array(self: Any, shape: Any, dtype: Any, alignment: Any = None) -> np.ndarray:
    """The simulator's shared array of a line, one for all threads also where two ask for it at once."""
    from numba.cuda.np.numpy_support import as_dtype

    caller = sys._getframe(1)
    line = caller.f_code.co_filename, caller.f_lineno
    with _allocating:
        if line not in self._allocations:
            self._allocations[line] = np.empty(shape, as_dtype(dtype))
        return self._allocations[line]


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    interval = sys.getswitchinterval()
    # The simulator polls its threads, which wait for each other: let them take turns more often.
    sys.setswitchinterval(1e-5)
    with standin.installed() as device, pytest.MonkeyPatch.context() as patch:
        from clusterlob_gpu import device_kernels

        for name, value in SMALL.items():
            patch.setattr(device_kernels, name, value)
        patch.setattr("numba.cuda.simulator.kernelapi.FakeCUDAShared.array", shared_array)
        yield device
    sys.setswitchinterval(interval)


def launched(name: str, *args: Any) -> tuple[Any, list[Any]]:
    """What a pass for the GPU returns, and its arguments afterwards, on the host."""
    import cupy

    from clusterlob_gpu import device_kernels

    def moved(arg: Any) -> Any:
        if isinstance(arg, Host):
            return arg.array.copy()
        return cupy.asarray(arg) if isinstance(arg, np.ndarray) else arg

    given = [moved(arg) for arg in args]
    result = getattr(device_kernels, name)(*given)
    return result, [arg.get() if isinstance(arg, cupy.ndarray) else arg for arg in given]


def computed(name: str, *args: Any) -> tuple[Any, list[Any]]:
    """The same on the CPU."""
    given = [arg.array if isinstance(arg, Host) else arg for arg in args]
    given = [arg.copy() if isinstance(arg, np.ndarray) else arg for arg in given]
    return getattr(kernels, name)(*given), given


def changed(name: str, *args: Any) -> list[np.ndarray]:
    """Arrays of the host after a pass for the GPU, and what it returns."""
    result, after = launched(name, *args)
    return [*(a for a, arg in zip(after, args, strict=True) if isinstance(arg, Host)), np.asarray(result)]


# ---- random arguments of every pass -----------------------------------------------------------------


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.int64)


def noise(*shape: int) -> Host:
    """A table that a pass adds to."""
    return Host(np.arange(math.prod(shape)).reshape(shape) * 7 - 9)


def floats(*shape: int) -> Host:
    return Host(np.linspace(-1, 2, math.prod(shape)).reshape(shape))


def labels(rng: Rng, n: int, k: int = 3) -> np.ndarray:
    return rng.integers(NO_CLUSTER, k, n).astype(np.int8)


def scored(rng: Rng, n: int) -> np.ndarray:
    return with_nulls(rng.normal(size=(6, n)).astype(np.float32), rng)


def order_of_rows(rng: Rng, n: int) -> Case:
    rows = rng.integers(0, 3, (n, 3))
    return tuple(rows[np.lexsort(rows.T[::-1])].T.copy())


def out_of_order(rng: Rng, n: int) -> Case:
    columns = order_of_rows(rng, n)
    if n > 1:
        at, other = rng.integers(0, n), rng.integers(0, n)
        for each in columns:
            each[at], each[other] = each[other], each[at]
    return columns


def lists(rng: Rng, n: int) -> Case:
    sizes = rng.integers(0, 5, n)
    values = np.where(rng.random(sizes.sum() + 2) < 0.1, NO_LEVEL, rng.integers(-1, 9, sizes.sum() + 2))
    return np.cumsum([2, *sizes]), values, 3, zeros(n), zeros(n)


def book(rng: Rng, n: int) -> Case:
    levels = rng.integers(-1, 4, (4, n))
    levels[rng.random((4, n)) < 0.1] = NO_LEVEL
    return *levels, np.full(n, 9, np.uint8)


def changes(rng: Rng, n: int, *, since: int = NO_TIME, values: int = 2) -> Case:
    return sorted_times(rng, n, 99), rng.integers(0, values, n), since, zeros(n)


def as_of(rng: Rng, n: int, *, inclusive: bool = False, rows: int = 30) -> Case:
    return sorted_times(rng, rows, 60), sorted_times(rng, n, 60), inclusive, zeros(n)


def met(rng: Rng, n: int, *, inclusive: bool = False) -> Case:
    side = rng.integers(0, 3, n).astype(np.uint8)
    ts, book_ts = sorted_times(rng, n, 60), sorted_times(rng, 20, 60)
    return ts, side, book_ts, 5, inclusive, zeros(n), np.full(n, 9, np.uint8)


def fates(rng: Rng, n: int) -> Case:
    fate, kinds = rng.integers(0, 4, n).astype(np.uint8), (np.int64, np.uint8, np.int64, np.int64, np.int32)
    columns = [rng.integers(0, 99, n).astype(kind) for kind in kinds]
    return fate, *columns, *(np.zeros(np.count_nonzero(fate == kernels.KEPT), kind) for kind in kinds)


def features(rng: Rng, n: int, *, own: bool = True) -> Case:
    m = 20
    sign, row = rng.choice([-1, 1], n).astype(np.int8), np.sort(rng.integers(0, m, n))
    since = [np.where(rng.random(m) < 0.3, NO_TIME, rng.integers(0, 99, m)) for _ in range(3)]
    book = rng.random((4, m)) + 1
    return (
        sorted_times(rng, n, 99) + 99,
        sign,
        rng.integers(1, 9, n),
        row,
        *book,
        *since,
        own,
        np.zeros((6, n)),
    )


def windows(rng: Rng, n: int, *, window: int = 7, skip: int = 0, f: int = 2, kind: str = "nulls") -> Case:
    x = np.stack([column(kind, n, rng) for _ in range(f)])
    return x, window, min(skip, n), np.full((f, n - min(skip, n)), -7.0)


def nulls(rng: Rng, n: int) -> Case:
    return (scored(rng, n),)


def clusters(rng: Rng, n: int, *, k: int = 3, bound: float = 1.5) -> Case:
    bounds = (np.linspace(-bound, -bound / 2, 6), np.linspace(bound / 2, bound, 6))
    return scored(rng, n), *map(Host, bounds), Host(rng.normal(size=(k, 6)))


def nearest(rng: Rng, n: int, *, k: int = 3) -> Case:
    return *clusters(rng, n, k=k), np.full(n, 9, np.int8)


def ties(rng: Rng, n: int) -> Case:
    z = rng.integers(-1, 2, (6, n)).astype(np.float32)
    centroids = rng.integers(-1, 2, (7, 6)) / 2
    return z, *map(Host, unbounded()), Host(centroids), np.full(n, 9, np.int8)


def step(rng: Rng, n: int, *, k: int = 3) -> Case:
    return *clusters(rng, n, k=k), floats(k, 6), noise(k)


def clips(rng: Rng, n: int) -> Case:
    z, low, high, _ = clusters(rng, n)
    return z, low, high, np.zeros((6, n), np.float32)


def bits(rng: Rng, n: int) -> Case:
    x = with_nulls(rng.choice([-math.inf, -1.5, -0.0, 0.0, 1e-40, 1.5, 1.25], (1, n)), rng)
    return x[0].astype(np.float32).view(np.uint32), noise(1 << 16)


def low_bits(rng: Rng, n: int) -> Case:
    high = kernels.ordered_bits(np.float32(1.25).view(np.uint32)) >> np.uint32(16)
    values, counts = bits(rng, n)
    return values, np.uint32(high), counts


def flow(rng: Rng, n: int, *, scale: int = 2**31 - 1) -> Case:
    ts, sign = sorted_times(rng, n, 100) + 1_000, rng.choice([-1, 1], n).astype(np.int8)
    price, qty = rng.integers(scale // 2, scale, (2, n))
    return (
        ts,
        sign,
        price,
        qty,
        labels(rng, n),
        1_000,
        30,
        noise(4, 3),
        noise(4, 3, 2),
        noise(4, 3),
        noise(4, 3),
    )


def sums(rng: Rng, n: int) -> Case:
    return scored(rng, n), labels(rng, n), floats(3, 6)


def outcomes(rng: Rng, n: int, *, rows: int = 25, horizons: tuple[int, ...] = (20, 0, 3)) -> Case:
    ts, book_ts = sorted_times(rng, n, 100), sorted_times(rng, rows, 100)
    sign, row = rng.choice([-1, 1], n).astype(np.int8), rng.integers(0, max(rows, 1), n)
    mid2, asked = rng.integers(2_000, 2_010, rows), Host(ints(*horizons))
    tables = noise(4, 3, len(horizons)), floats(4, 3, len(horizons))
    return ts, sign, row, labels(rng, n), book_ts, mid2, 95, 9, asked, 0, 30, *tables


CASES: dict[str, list[Callable[[Rng, int], Case]]] = {
    "is_sorted": [order_of_rows, out_of_order],
    "reduce_levels": [lists],
    "book_fault": [book],
    "last_changes": [
        changes,
        lambda rng, n: changes(rng, n, since=5),
        lambda rng, n: changes(rng, n, values=1),
    ],
    "asof_before": [
        as_of,
        lambda rng, n: as_of(rng, n, inclusive=True),
        lambda rng, n: as_of(rng, n, rows=0),
    ],
    "meet_book": [met, lambda rng, n: met(rng, n, inclusive=True)],
    "take_kept": [fates],
    "raw_features": [features, lambda rng, n: features(rng, n, own=False)],
    "rolling_z": [windows],
    "void_nulls": [nulls],
    "nearest_centroid": [nearest, ties, lambda rng, n: nearest(rng, n, k=5)],
    "lloyd_partial": [step, lambda rng, n: step(rng, n, k=2)],
    "clip_columns": [clips],
    "count_high_bits": [bits],
    "count_low_bits": [low_bits],
    "bucket_flow": [flow, lambda rng, n: flow(rng, n, scale=10)],
    "cluster_sums": [sums],
    "markout_sums": [
        outcomes,
        lambda rng, n: outcomes(rng, n, rows=0),
        lambda rng, n: outcomes(rng, n, horizons=()),
    ],
}
"""Arguments of every pass, by random numbers and number of rows."""


@pytest.mark.parametrize("n", [0, 1, 15, 50])
@pytest.mark.parametrize(
    ("name", "make"), [pytest.param(name, make, id=name) for name, makes in CASES.items() for make in makes]
)
def test_pass__equals_that_of_the_cpu(
    device: Device, name: str, make: Callable[[Rng, int], Case], n: int
) -> None:
    """Integers, labels and what is computed row by row in every bit, sums of floats to 1e-12."""
    for seed in range(3 if n < 50 else 1):
        args = make(np.random.default_rng([seed, n]), n)
        (expected, wanted), (found, got) = computed(name, *args), launched(name, *args)
        if isinstance(expected, float):
            assert found == pytest.approx(expected, rel=1e-12)
        else:
            assert found == expected
        for one, other in zip(wanted, got, strict=True):
            summed = isinstance(one, np.ndarray) and one.dtype == np.float64
            rows = name not in ("rolling_z", "lloyd_partial", "cluster_sums", "markout_sums")
            if summed and not rows:
                np.testing.assert_allclose(other, one, rtol=1e-12, atol=1e-12)
            else:
                np.testing.assert_array_equal(other, one)


# ---- rolling z-score --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("window", "n", "skip"),
    [(2, 9, 0), (5, 23, 0), (5, 25, 7), (8, 41, 16), (21, 70, 0), (21, 64, 42), (7, 5, 0)],
)
def test_rolling_z__equals_exact_fractions(device: Device, kind: str, window: int, n: int, skip: int) -> None:
    """Windows shorter and longer than a block of threads, several values then to a thread."""
    args = windows(np.random.default_rng([window, n]), n, window=window, skip=skip, f=1, kind=kind)
    got = launched("rolling_z", *args)[1][-1]
    np.testing.assert_allclose(got[0], rolling_exact(args[0][0], window)[skip:], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("window", [6, 19])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e9 + 0.1, -1e12, 5e-324])
def test_rolling_z__constant_window_is_exactly_zero(device: Device, window: int, value: float) -> None:
    x = np.full((1, 5 * window), value)
    x[0, window + 2] = 3e5
    z = launched("rolling_z", x, window, 0, np.full_like(x, -7.0))[1][-1][0]
    assert np.isnan(z[: window - 1]).all()
    np.testing.assert_array_equal(z[window - 1 : window + 2], 0.0)
    assert abs(z[window + 2]) == pytest.approx((window - 1) / math.sqrt(window), rel=1e-12)
    np.testing.assert_array_equal(z[2 * window + 2 :], 0.0)


def test_rolling_z__null_reaches_as_far_as_its_window(device: Device) -> None:
    x = np.arange(40.0)[None] ** 2
    x[0, 17] = math.nan
    z = launched("rolling_z", x, 7, 0, np.zeros_like(x))[1][-1][0]
    assert np.flatnonzero(np.isnan(z)).tolist() == [*range(6), *range(17, 24)]


@pytest.mark.parametrize("window", [5, 11])
def test_rolling_z__cut_at_a_block_with_the_one_before_in_front(device: Device, window: int) -> None:
    """The same bits, and from a view into a longer table."""
    x = np.stack([column(kind, 5 * window, np.random.default_rng(3)) for kind in KINDS])
    whole = launched("rolling_z", x, window, 0, np.zeros_like(x))[1][-1]
    cut = 3 * window
    piece = np.zeros((len(x), 5 * window - cut))
    got = launched("rolling_z", x[:, cut - window :], window, window, piece)[1][-1]
    np.testing.assert_array_equal(got, whole[:, cut:])


# ---- sums of floats ---------------------------------------------------------------------------------

N = 77


def in_pieces(name: str, args: Case, cut: int) -> list[np.ndarray]:
    """Tables of the host after a pass over the rows before and after a cut."""
    tables = [arg for arg in args if isinstance(arg, Host)]
    for rows in (slice(None, cut), slice(cut, None)):
        part = [arg[..., rows] if isinstance(arg, np.ndarray) and arg.shape[-1] == N else arg for arg in args]
        news = iter(changed(name, *part))
        args = tuple(Host(next(news)) if isinstance(arg, Host) else arg for arg in args)
    return [arg.array for arg in args if isinstance(arg, Host)][: len(tables)]


@pytest.mark.parametrize("cut", [0, 16, 48, 64])
@pytest.mark.parametrize("name", ["lloyd_partial", "cluster_sums", "bucket_flow", "markout_sums"])
def test_sums__same_bits_however_a_day_is_cut(device: Device, name: str, cut: int) -> None:
    """At multiples of `PIECE`."""
    args = CASES[name][0](np.random.default_rng(11), N)
    for one, other in zip(changed(name, *args), in_pieces(name, args, cut), strict=False):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["lloyd_partial", "cluster_sums", "bucket_flow", "markout_sums"])
def test_sums__same_bits_however_the_device_is_filled(
    device: Device, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Also on a second run."""
    args = CASES[name][0](np.random.default_rng(11), N)
    expected = changed(name, *args)
    for threads, most, shares in ((4, 3, 2), (7, 2, 2), (1, 9, 1), (32, 1, 3)):
        monkeypatch.setattr("clusterlob_gpu.device_kernels.THREADS", threads)
        monkeypatch.setattr("clusterlob_gpu.device_kernels.MOST_BLOCKS", most)
        monkeypatch.setattr("clusterlob_gpu.device_kernels._SHARES", shares)
        for one, other in zip(expected, changed(name, *args), strict=True):
            np.testing.assert_array_equal(one, other)


# ---- the module -------------------------------------------------------------------------------------


def test_module__has_every_pass_and_a_case_for_it(device: Device) -> None:
    from clusterlob_gpu import device_kernels

    passes = {
        name: part
        for name, part in vars(device_kernels).items()
        if isinstance(part, FunctionType) and f"`kernels.{name}`" in (part.__doc__ or "")
    }
    assert passes.keys() == CASES.keys()
    for name, part in passes.items():
        ours = inspect.signature(part).parameters
        assert list(ours) == list(inspect.signature(getattr(kernels, name).py_func).parameters)
    taken = {name for name, part in vars(kernels).items() if not name.startswith("_") and on_cpu(part)}
    assert taken == CASES.keys()


def on_cpu(part: object) -> bool:
    """Whether a part of `kernels` is a pass: what the GPU's twin of the module compiles for the CPU still."""
    from clusterlob_gpu import device_kernels

    name = getattr(part, "__name__", "")
    return hasattr(part, "py_func") and hasattr(getattr(device_kernels.scalar, name), "nopython_signatures")


def test_module__every_kernel_is_launched(device: Device) -> None:
    """By the cases of the passes."""
    with standin.installed() as fresh:
        from clusterlob_gpu import device_kernels

        for name, makes in CASES.items():
            launched(name, *makes[0](np.random.default_rng(1), 9))
        kernels_of = {
            name for name, part in vars(device_kernels).items() if getattr(part, "_device", True) is False
        }
        assert len(kernels_of) >= 14
        assert {f"kernel {name}" for name in kernels_of} == {
            name for name in fresh.calls if name.startswith("kernel ")
        }


@pytest.mark.parametrize("at", range(3))
def test_module__array_of_the_host_is_refused(device: Device, at: int) -> None:
    import cupy

    from clusterlob_gpu import device_kernels

    columns: list[Any] = [cupy.arange(5) for _ in range(3)]
    columns[at] = np.arange(5)
    with pytest.raises(TypeError, match="a kernel takes device arrays and numbers"):
        device_kernels.is_sorted(*columns)
