"""On a GPU: every pass, every stage and whole runs against the CPU, the same bits twice, little memory.

Skips itself where no device answers.  A process in which Numba's simulator stands for the GPU, as for most
other tests, cannot use a real one: there, one test runs this file again in a process of its own.

    pytest tests/test_gpu.py

Under the stand-in (`standin.environment()`) the same tests run at small sizes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from clusterlob_gpu import backend, context, parity, pipeline
from clusterlob_gpu.backend import CPU, Backend
from clusterlob_gpu.config import ClusterConfig, FlowConfig, RunConfig, make_config
from clusterlob_gpu.days import DayJob, book_artefact, reduce_book
from clusterlob_gpu.errors import InputError
from clusterlob_gpu.files import Location
from clusterlob_gpu.lake.layout import day_start_us
from clusterlob_gpu.lake.native import open_symbol
from clusterlob_gpu.lake.synthetic import ingest_synthetic, make_market
from clusterlob_gpu.lake.tardis import ingest_tardis
from clusterlob_gpu.store import Store
from clusterlob_gpu.workers import Place, open_workers

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import gpu_passes
from gpu_passes import PASSES, Columns, Pass

SYMBOL, EXCHANGE, START = "BTCUSDT", "synthetic", date(2024, 5, 1)
CAPTURES = Path(__file__).parents[2] / "shared" / "data" / "tardis"


def why_not() -> str | None:
    """What keeps a GPU from being tested in this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, at their first import
        try:
            backend.choose("gpu")
        except InputError as error:
            return str(error)
    return None


def is_stand_in() -> bool:
    properties = import_module("cupy").cuda.runtime.getDeviceProperties(0)
    return bool(properties["name"] == b"stand-in")


MISSING = why_not()
STAND_IN = MISSING is None and is_stand_in()
TAKEN = MISSING is None and not STAND_IN and os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
ELSEWHERE = "Numba's simulator is on in this process; test_gpu__in_a_process_of_its_own has a look"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
    # What the real libraries warn of is theirs: Numba, for one, of any launch below 128 blocks.
    pytest.mark.filterwarnings("default"),
]
here = pytest.mark.skipif(TAKEN, reason=ELSEWHERE)
real = pytest.mark.skipif(STAND_IN or TAKEN, reason="for a real device" if STAND_IN else ELSEWHERE)

SMALL = {"trades_per_day": 180, "snapshots_per_day": 240} if STAND_IN else {"trades_per_day": 200_000}
DAYS = 1 if STAND_IN else 3
CLUSTER = ["keep_trades=true"]
FLOW = ["min_trades=20", "refresh=bar", "threshold_window=12h", "unit=order"]
if STAND_IN:
    CLUSTER += ["n_init=1", "k=2", "bucket=6h", "horizons=[6h]", "max_staleness=12h", "window=170"]
    FLOW += ["bar=6h", "horizons=[6h]"]


@pytest.mark.skipif(not TAKEN, reason="the tests run in this process")
def test_gpu__in_a_process_of_its_own() -> None:
    clean = {name: value for name, value in os.environ.items() if name != "NUMBA_ENABLE_CUDASIM"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", __file__]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:]


@pytest.fixture(scope="module", autouse=True)
def _small_blocks() -> Iterator[None]:
    """Under the stand-in, blocks of one thread: the simulator starts one of Python's for each."""
    with pytest.MonkeyPatch.context() as patch:
        if STAND_IN:
            small = {"THREADS": 1, "MOST_BLOCKS": 1, "TEAM": 1, "WIDEST": 1, "PIECE": 64}
            for name in ("device_kernels", "device_flow_kernels"):
                module = import_module(f"clusterlob_gpu.{name}")
                for constant in small.keys() & vars(module).keys():
                    patch.setattr(module, constant, small[constant])
            patch.setattr(gpu_passes, "BAR", 6 * 3600 * 10**6)
        yield


@pytest.fixture
def gpu() -> Iterator[Backend]:
    """A GPU that holds nothing yet."""
    backend.of.cache_clear()
    yield backend.of("gpu")
    backend.of.cache_clear()


# ---- passes -------------------------------------------------------------------------------------------


def same(gpu: Backend, one: Pass, columns: dict[str, np.ndarray]) -> None:
    """Run a pass on both machines: integers are equal, floats to 1e-9 of their size."""
    on_cpu, on_gpu = (one.arguments(Columns(on, columns)) for on in (CPU, gpu))
    expected, found = one.run(CPU, on_cpu), one.run(gpu, on_gpu)
    for place, (mine, theirs) in enumerate(zip(on_cpu, on_gpu, strict=True)):
        if place not in one.scratch:
            close(mine, gpu.to_host(theirs) if isinstance(theirs, gpu.xp.ndarray) else theirs)
    close(expected, found)
    for place in one.scratch if one.name == "merge_orders" else ():
        close(on_cpu[place][:expected], gpu.to_host(on_gpu[place][:expected]))


def close(expected: Any, found: Any) -> None:
    """Values within rounding; float32 within its own."""
    if np.asarray(expected).dtype.kind == "f" and found is not None:
        tolerance = 1e-6 if np.asarray(expected).dtype == np.float32 else 1e-9
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
    else:
        np.testing.assert_array_equal(found, expected)


@here
@pytest.mark.parametrize("one", PASSES, ids=lambda one: one.name)
def test_pass__random_columns(gpu: Backend, one: Pass, random: dict[str, np.ndarray]) -> None:
    same(gpu, one, random)


@pytest.fixture(scope="module")
def random() -> dict[str, np.ndarray]:
    return gpu_passes.random_columns(*((180, 60) if STAND_IN else (1_000_003, 200_001)))


@real
@pytest.mark.parametrize("one", PASSES, ids=lambda one: one.name)
def test_pass__a_full_day(gpu: Backend, one: Pass, day: dict[str, np.ndarray]) -> None:
    same(gpu, one, day)


@pytest.fixture(scope="module")
def day(full: Path) -> dict[str, np.ndarray]:
    return gpu_passes.day_columns(open_symbol(full, EXCHANGE, SYMBOL), START, day_start_us(START))


# ---- lakes and runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gpu") / "lake"
    ingest_synthetic(root, make_market(start=START, days=DAYS, **SMALL))
    return root


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One day of BTCUSDT's size."""
    root = tmp_path_factory.mktemp("full") / "lake"
    ingest_synthetic(root, make_market(start=START, days=1, full_size=True))
    return root


def run(
    lake: Path, out: Path, on: Any, kind: type[RunConfig] = ClusterConfig, threads: int = 1, **asked: Any
) -> Path:
    """A run over the small lake's days, or those asked for, with a store of its own."""
    config: Any = make_config({}, CLUSTER if kind is ClusterConfig else FLOW, kind)
    given = {"exchange": EXCHANGE, "symbols": (SYMBOL,), "start": START, "end": START.replace(day=DAYS)}
    request = pipeline.RunRequest(
        lake=lake,
        out=out,
        store=out.with_name(f"{out.name}-store"),
        config=config,
        backend=on,
        pictures=False,
        **given | asked,
    )
    call: Any = pipeline.run_cluster if kind is ClusterConfig else pipeline.run_flow
    with open_workers(Place(kind="threads", n_workers=threads), lambda *_: None) as workers:
        return Path(call(request, workers))


@pytest.fixture(scope="module")
def on_gpu(lake: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that others are compared with."""
    backend.of.cache_clear()
    return run(lake, tmp_path_factory.mktemp("gpu") / "run", "gpu")


def within(found: Sequence[parity.Difference]) -> None:
    assert [one for one in found if not one.ok] == []
    assert sum(one.rows for one in found) > 100


def identical(one: Path, other: Path) -> None:
    """All tables of two runs, bit by bit."""
    names = [sorted(path.name for path in (out / "results").rglob("*.parquet")) for out in (one, other)]
    assert names[0] == names[1]
    for path in (one / "results").rglob("*.parquet"):
        if path.is_file():
            table = pd.read_parquet(other / path.relative_to(one))
            pd.testing.assert_frame_equal(pd.read_parquet(path), table, check_exact=True)


# ---- stages and runs ----------------------------------------------------------------------------------


def reduced(lake: Path, store: Path, on: Any, seen: date = START) -> tuple[str, pd.DataFrame, dict[str, Any]]:
    """Address, rows and record of a day's book artefact."""
    symbol = open_symbol(lake, EXCHANGE, SYMBOL)
    job = DayJob(symbol, Location.of(store), ClusterConfig(), seen, on)
    made = reduce_book(job).made
    record = Store(store).find(book_artefact(job))
    assert record is not None
    rows = pd.read_parquet(Store(store).folder(made.address) / "rows.parquet")
    return made.address, rows, dict(record.record)


@here
def test_reduce_book__is_the_cpus_artefact(gpu: Backend, lake: Path, tmp_path: Path) -> None:
    """The same name, rows and record: either backend goes on from the other's."""
    mine, theirs = (reduced(lake, tmp_path / on, on) for on in ("cpu", "gpu"))
    assert theirs[0] == mine[0]
    assert theirs[2] == mine[2]
    pd.testing.assert_frame_equal(theirs[1], mine[1], check_exact=True)
    assert list(mine[1]) == list(context.ROW_COLUMNS)


@here
def test_cluster__equals_the_cpu(lake: Path, on_gpu: Path, tmp_path: Path) -> None:
    """Features, fit, labels, flow, mids and IC."""
    within(parity.compare_cluster(run(lake, tmp_path / "cpu", "cpu"), on_gpu))


@here
def test_flow__equals_the_cpu(gpu: Backend, lake: Path, tmp_path: Path) -> None:
    """Thresholds, bars, classes, orders and IC."""
    within(parity.compare_flow(*(run(lake, tmp_path / on, on, FlowConfig) for on in ("cpu", "gpu"))))


@real
@pytest.mark.parametrize("kind", [ClusterConfig, FlowConfig])
def test_a_full_day__equals_the_cpu(gpu: Backend, full: Path, tmp_path: Path, kind: type[RunConfig]) -> None:
    compare = parity.compare_cluster if kind is ClusterConfig else parity.compare_flow
    within(compare(*(run(full, tmp_path / on, on, kind, end=START) for on in ("cpu", "gpu"))))


CAPTURED = {
    "bitstamp": ("BTCUSD", date(2015, 5, 1)),
    "binance-futures": ("BTCUSDT", date(2024, 7, 18)),
}


@real
@pytest.mark.skipif(not CAPTURES.is_dir(), reason="the real captures in ../shared/data are absent")
@pytest.mark.parametrize("exchange", CAPTURED)
def test_captures__equal_the_cpu(gpu: Backend, exchange: str, tmp_path: Path) -> None:
    symbol, when = CAPTURED[exchange]
    which = {"start": when, "end": when}
    ingest_tardis(CAPTURES, tmp_path / "lake", exchanges=[exchange], symbols=[symbol], **which)
    asked = {"exchange": exchange, "symbols": (symbol,), **which}
    within(
        parity.compare_cluster(*(run(tmp_path / "lake", tmp_path / on, on, **asked) for on in ("cpu", "gpu")))
    )


# ---- the same bits ------------------------------------------------------------------------------------


@here
@pytest.mark.parametrize("threads", [1, 3])
def test_cluster__same_bits_again(
    gpu: Backend, lake: Path, on_gpu: Path, tmp_path: Path, threads: int
) -> None:
    identical(run(lake, tmp_path / "again", "gpu", threads=threads), on_gpu)


@here
def test_cluster__same_bits_in_smaller_pieces(gpu: Backend, lake: Path, on_gpu: Path, tmp_path: Path) -> None:
    gpu.rows_at_once = 128 if STAND_IN else 1 << 16
    identical(run(lake, tmp_path / "cut", "gpu"), on_gpu)


@real
def test_cluster__same_bits_with_less_memory_than_a_day_wants(
    gpu: Backend, full: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From reduced books, with four fifths of what a day has taken: pieces get smaller, and it is said."""
    books = run(full, tmp_path / "books", "gpu", end=START).with_name("books-store") / "book"
    for name in ("whole", "short"):
        shutil.copytree(books, tmp_path / f"{name}-store" / "book")
    backend.of.cache_clear()
    whole, peak = peaked(lambda: run(full, tmp_path / "whole", "gpu", end=START))
    backend.of.cache_clear()
    with limited(peak * 4 // 5):
        short = run(full, tmp_path / "short", "gpu", end=START)
    assert "device memory is short" in caplog.text
    identical(short, whole)


@contextmanager
def limited(size: int) -> Iterator[None]:
    """No more than that many bytes of the device for all that RMM hands out."""
    resources = import_module("rmm").mr
    before = resources.get_current_device_resource()
    resources.set_current_device_resource(resources.LimitingResourceAdaptor(before, size))
    try:
        yield
    finally:
        backend.of.cache_clear()
        resources.set_current_device_resource(before)


def peaked(work: Callable[[], Path]) -> tuple[Path, int]:
    """What some work gives, and the most device memory that it has held."""
    rmm = import_module("rmm.statistics")
    with rmm.statistics():
        result = work()
        return result, int(rmm.get_statistics().peak_bytes)
