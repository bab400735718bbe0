"""The whole GPU pipeline on a small lake, against the strict stand-in: same results as the CPU, no GPU.

Kernels run under Numba's simulator, a Python thread per CUDA thread, so blocks and the lake are small.
"""

from __future__ import annotations

import datetime as dt
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import pytest
import standin
from standin.device import Device

from clusterlob_gpu import backend, clustering, parity, pipeline
from clusterlob_gpu.cli import cli
from clusterlob_gpu.config import ClusterConfig, FlowConfig, make_config
from clusterlob_gpu.errors import ClusterlobError, InputError
from clusterlob_gpu.lake.synthetic import ingest_synthetic, make_market
from clusterlob_gpu.workers import Place, open_workers

DAYS = [dt.date(2024, 5, 1), dt.date(2024, 5, 2)]
CLUSTER = ["n_init=1", "keep_trades=true", "bucket=1h", "window=20", "horizons=[1h]", "max_staleness=1h"]
FLOW = ["bar=1h", "min_trades=20", "refresh=bar", "threshold_window=12h", "unit=order"]
THREADS = {"kind": "threads", "n_workers": 1}


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gpu") / "lake"
    ingest_synthetic(root, make_market(start=DAYS[0], days=2, trades_per_day=120, snapshots_per_day=160))
    return root


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    """The stand-in, and blocks of a few threads."""
    with standin.installed() as device, pytest.MonkeyPatch.context() as patch:
        from clusterlob_gpu import device_flow_kernels, device_kernels

        small = {"THREADS": 2, "MOST_BLOCKS": 1, "TEAM": 2, "WIDEST": 2, "PIECE": 64, "_SHARES": 1}
        for module in (device_kernels, device_flow_kernels):
            for name, value in small.items():
                if hasattr(module, name):
                    patch.setattr(module, name, value)
        backend.of.cache_clear()
        yield device
    backend.of.cache_clear()


@pytest.fixture
def fresh(device: Device) -> Iterator[backend.Backend]:
    """A GPU that holds nothing yet."""
    backend.of.cache_clear()
    yield backend.of("gpu")
    backend.of.cache_clear()
    device.limit = None


def run_cluster(
    lake: Path, out: Path, machine: backend.Name, *settings: str, place: dict[str, object] = THREADS
) -> Path:
    config = make_config({}, [*CLUSTER, *settings], ClusterConfig)
    return run(pipeline.run_cluster, lake, out, machine, config, place)


def run_flow(lake: Path, out: Path, machine: backend.Name) -> Path:
    return run(pipeline.run_flow, lake, out, machine, make_config({}, FLOW, FlowConfig), THREADS)


def run(command, lake, out, machine, config, place) -> Path:
    request = pipeline.RunRequest(
        lake=lake,
        exchange="synthetic",
        symbols=("BTCUSDT",),
        start=DAYS[0],
        end=DAYS[-1],
        out=out,
        config=config,
        pictures=False,
        backend=machine,
    )
    with open_workers(Place(**place), lambda *_: None) as workers:
        return command(request, workers)


@pytest.fixture(scope="module")
def on_gpu(lake: Path, device: Device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_cluster(lake, tmp_path_factory.mktemp("gpu") / "run", "gpu")


@pytest.fixture(scope="module")
def on_cpu(lake: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_cluster(lake, tmp_path_factory.mktemp("cpu") / "run", "cpu")


def tables(out: Path) -> dict[str, pd.DataFrame]:
    return {path.name: pd.read_parquet(path) for path in sorted((out / "results").glob("*.parquet"))}


def assert_within(found: list[parity.Difference]) -> None:
    assert [one for one in found if not one.ok] == []
    assert sum(one.rows for one in found) > 500


def test_cluster__whole_run_equals_the_cpu(on_cpu: Path, on_gpu: Path, device: Device) -> None:
    """Every stage ran on the device, within the tolerances between backends."""
    assert_within(parity.compare_cluster(on_cpu, on_gpu))
    stages = {
        "read": "cudf.read_parquet",
        "lists": "kernel _reduce_levels",
        "book": "kernel _book_fault",
        "as-of": "kernel _meet_book",
        "features": "kernel _raw_features",
        "z-scores": "kernel _rolling_z",
        "fit": "kernel _nearest",
        "sums": "kernel _piece_sums",
        "buckets": "kernel _bucket_flow",
        "mark-outs": "kernel _markouts",
        "mids": "kernel _asof_before",
    }
    missing = [stage for stage, call in stages.items() if not device.calls[call]]
    assert missing == []
    print(f"{len(stages)} stages of ClusterLOB ran through the stand-in")


@pytest.mark.parametrize("engine", ["cuml", "cuml_dask"])
def test_engines__reach_the_same_centres(
    engine: str, lake: Path, on_cpu: Path, on_gpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dask_cuda

    monkeypatch.setattr(dask_cuda.LocalCUDACluster, "processes", False)
    place = {"kind": "cuda", "n_workers": 1} if engine == "cuml_dask" else THREADS
    gpu = run_cluster(lake, on_gpu.parent / engine, "gpu", f"engine={engine}", place=place)
    assert_within(parity.compare_cluster(on_cpu, gpu))


def test_cluster__pieces_of_a_day_change_nothing(
    lake: Path, on_gpu: Path, tmp_path: Path, fresh: backend.Backend
) -> None:
    """Nor does a device that has lost what the store says it has made."""
    fresh.rows_at_once = 64
    store = shutil.copytree(on_gpu.parent / "store", tmp_path / "store")
    shutil.rmtree(store / "label")
    cut = tables(run_cluster(lake, tmp_path / "run", "gpu"))
    for name, table in tables(on_gpu).items():
        pd.testing.assert_frame_equal(cut[name], table, check_exact=True)


def test_cluster__short_memory_is_reported_and_changes_nothing(
    lake: Path,
    on_gpu: Path,
    tmp_path: Path,
    fresh: backend.Backend,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A device that has no room for z-scores of more than 110 trades at once, those before included."""
    whole = fresh.kernels.rolling_z

    def scarce(x, window, skip, out) -> None:
        if x.shape[1] > 110:
            raise MemoryError("std::bad_alloc")
        whole(x, window, skip, out)

    monkeypatch.setattr(fresh.kernels, "rolling_z", scarce)
    monkeypatch.setattr(backend, "_LEAST_ROWS", 64)
    fresh.rows_at_once = 256
    short = tables(run_cluster(lake, tmp_path / "run", "gpu"))
    assert fresh.rows_at_once == 64
    assert "device memory is short: days are taken in pieces of 64 trades" in caplog.text
    for name, table in tables(on_gpu).items():
        pd.testing.assert_frame_equal(short[name], table, check_exact=True)


def test_cluster__no_memory_at_all_is_the_fault_of_the_task(
    lake: Path, on_gpu: Path, tmp_path: Path, fresh: backend.Backend, device: Device
) -> None:
    device.limit = device.allocated + 1_000
    with pytest.raises(ClusterlobError, match=r"book: a task found no memory \(std::bad_alloc"):
        run_cluster(lake, tmp_path / "run", "gpu")


def test_winsorize__bounds_are_those_of_the_cpu(device: Device) -> None:
    z = np.random.default_rng(1).normal(size=(6, 40)).astype(np.float32)
    z[:, 3] = np.nan
    found = []
    for machine in get_args(backend.Name):
        on = backend.of(machine)
        held = on.xp.asarray(z)
        low = partial(clustering.low_counts, held, on=on)
        found.append(clustering.winsor_bounds((0.1, 0.9), clustering.high_counts(held, on), low))
    np.testing.assert_array_equal(found[0].low, found[1].low)
    np.testing.assert_array_equal(found[0].high, found[1].high)


def test_flow__whole_run_equals_the_cpu(lake: Path, tmp_path: Path, device: Device) -> None:
    cpu, gpu = (run_flow(lake, tmp_path / machine / "run", machine) for machine in ("cpu", "gpu"))
    assert_within(parity.compare_flow(cpu, gpu))
    assert device.calls["cudf.read_parquet"]


def test_parity__command_shows_the_differences(
    lake: Path, device: Device, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = f"parity --lake {lake} --exchange synthetic --symbol BTCUSDT --day {DAYS[0]}".split()
    shared = [f"--set={setting}" for setting in (*CLUSTER, *FLOW) if "keep_trades" not in setting]
    cli.main([*arguments, *shared], standalone_mode=False)
    out = capsys.readouterr().out
    assert "z_spread" in out
    assert "bar flow_imbalance_large" in out
    assert "DIFFERS" not in out


def test_parity__finds_what_is_apart(on_cpu: Path, tmp_path: Path) -> None:
    """A z-score that is off by a thousandth, a label that is another, an IC that one run does not have."""
    other = shutil.copytree(on_cpu, tmp_path / "other")
    assert_within(parity.compare_cluster(on_cpu, other))
    path = next((other / "results" / "trade_features.parquet").iterdir())
    trades = pd.read_parquet(path)
    trades.loc[5, "z_spread"] += 1e-3
    trades.loc[7, "cluster"] += 1
    trades.to_parquet(path)
    ic = pd.read_parquet(other / "results" / "ic.parquet")
    ic["ic"] = ic["ic"].where(ic.index != ic["ic"].first_valid_index(), np.nan)
    ic.to_parquet(other / "results" / "ic.parquet")
    wrong = [one.quantity for one in parity.compare_cluster(on_cpu, other) if not one.ok]
    assert wrong == ["z_spread", "labels", "ic"]
    trades.iloc[1:].to_parquet(path)
    with pytest.raises(ClusterlobError, match="kept different trades"):
        parity.compare_cluster(on_cpu, other)


def test_engines__need_their_machine(lake: Path, tmp_path: Path, device: Device) -> None:
    with pytest.raises(InputError, match="engine = 'cuml': needs the gpu backend"):
        run_cluster(lake, tmp_path / "run", "cpu", "engine=cuml")
    with pytest.raises(InputError, match="engine = 'sklearn': computes on the CPU"):
        run_cluster(lake, tmp_path / "run", "gpu", "engine=sklearn")
    with pytest.raises(InputError, match="needs Dask workers with GPUs"):
        run_cluster(lake, tmp_path / "run", "gpu", "engine=cuml_dask")


@pytest.mark.parametrize("planted", ["cudf.merge_asof(None, None)", "cupy.maximum.accumulate(found)"])
def test_planted__use_of_what_rapids_lacks_fails_the_run(
    planted: str, lake: Path, tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line of the pipeline is replaced by one that pandas or NumPy would be happy with."""
    from clusterlob_gpu.lake import device_decode

    source = Path(device_decode.__file__).read_text()
    line = "        return cudf.read_parquet(content, columns=names, row_groups=groups)"
    assert line in source
    code = source.replace(line, f"        found = cupy.zeros(3)\n        {planted}\n{line}")
    monkeypatch.setattr(device_decode, "_read", None)
    exec(compile(code, "planted", "exec"), vars(device_decode))
    with pytest.raises((AttributeError, ClusterlobError), match=r"merge_asof|accumulate"):
        run_cluster(lake, tmp_path / "run", "gpu")


def test_choose__auto_takes_what_is_there(device: Device) -> None:
    assert [backend.choose(asked) for asked in ("auto", "gpu", "cpu")] == ["gpu", "gpu", "cpu"]
    assert backend.choose("auto", gpus=False) == "cpu"
