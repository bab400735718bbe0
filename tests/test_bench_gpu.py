"""The benchmark of the GPU runs on the stand-in from end to end; the bundle keeps one architecture's code."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import standin

from clusterlob_gpu import backend, flow_kernels, kernels
from clusterlob_gpu.backend import CPU
from clusterlob_gpu.schema import US_PER_DAY

SCRIPTS = Path(__file__).parents[1] / "scripts"


def load(name: str) -> ModuleType:
    """A script as a module, whether its file has a suffix or not."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        path = SCRIPTS / name
        spec = spec_from_loader(path.stem, SourceFileLoader(path.stem, str(path)))
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPTS))
    return module


passes = load("gpu_passes.py")
bench = load("bench_gpu")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-in with single threads: the simulator starts one of Python's for each."""
    pytest.importorskip("numba_cuda")
    for name, value in standin.environment().items():  # for child processes
        monkeypatch.setenv(name, value)
    with standin.installed():
        backend.of.cache_clear()
        from clusterlob_gpu import device_flow_kernels, device_kernels

        small = {"THREADS": 1, "MOST_BLOCKS": 1, "TEAM": 1, "WIDEST": 1, "PIECE": 256}
        for module in (device_kernels, device_flow_kernels):
            for name in small.keys() & vars(module).keys():
                monkeypatch.setattr(module, name, small[name])
        yield
    backend.of.cache_clear()


@pytest.mark.usefixtures("device")
def test_bench_gpu__works_on_the_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "WARM_TRADES", 180)
    monkeypatch.setattr(passes, "BAR", US_PER_DAY // 4)
    sizes = "--days 2 --trades-per-day 180 --fold 1 --copy-mib 1 --repetitions 0 --threads 1"
    settings = "n_init=1 bucket=6h window=20 bar=6h min_trades=20 horizons=[6h] max_staleness=12h"
    given = [*sizes.split(), *(part for each in settings.split() for part in ("--set", each))]
    bench.main([*given, "--folder", str(tmp_path), "--json", str(tmp_path / "gpu" / "none.json")])
    held = json.loads((tmp_path / "gpu" / "none.json").read_text())
    assert held["device"]["device"] == "stand-in"
    assert "mean nothing" in held["note"]
    assert [target["met"] for target in held["targets"]] == [None, None, None]
    assert list(held["passes"]) == [one.name for one in passes.PASSES]
    assert set(held["runs"]) == {"cluster gpu", "cluster cpu", "flow gpu", "flow cpu"}
    assert held["stages"]["gpu"].keys() == held["stages"]["cpu"].keys()
    assert held["runs"]["cluster gpu"]["flat"]["peak_device_mib"] > 0
    assert list(held["start_up"])[2] == "CUDA context"
    shown = capsys.readouterr().out
    assert "other size or no device" in shown
    assert "MISSED" not in shown


def test_pass_rates__launches_cancel() -> None:
    """A pass that moves 2 GB a day in 1 ms after 3 ms of launches: 4 ms for one day, 7 ms for four."""
    found = bench.pass_rates(2 * 10**9, 8 * 10**9, 0.004, 0.007, 4000.0)
    assert found == pytest.approx({"gbs": 500, "share": 0.125, "beyond_gbs": 2000, "beyond_share": 0.5})
    assert bench.pass_rates(10, 40, 0.004, 0.003, 4000.0)["beyond_gbs"] is None


def test_bench_gpu__without_a_device_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main([])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bench_gpu: --backend gpu: ")


def test_passes__are_all_that_both_machines_have() -> None:
    """Every public function of the device modules that the CPU's modules have too."""
    pytest.importorskip("numba_cuda")
    with standin.installed():
        from clusterlob_gpu import device_flow_kernels, device_kernels
    pairs = ((device_kernels, kernels), (device_flow_kernels, flow_kernels))
    for on_device, on_host in pairs:
        shared = {
            name
            for name, function in vars(on_device).items()
            if not name.startswith("_") and getattr(function, "__module__", "") == on_device.__name__
        }
        room = on_host.__name__.rpartition(".")[2]
        listed = {one.name for one in passes.PASSES if one.room == room}
        assert listed == shared & vars(on_host).keys()


@pytest.mark.parametrize("one", passes.PASSES, ids=lambda one: one.name)
def test_passes__need_no_more_bytes_than_their_columns_have(columns: Any, one: Any) -> None:
    """Bytes of every column of trades or book rows among the arguments, once each."""
    given = [each for each in one.arguments(columns) if isinstance(each, np.ndarray)]
    there = sum(each.nbytes for each in given if each.size >= columns.m)
    assert 0 < one.moved(columns) <= 1.01 * there


@pytest.fixture(scope="module")
def columns() -> Any:
    return passes.Columns(CPU, passes.random_columns(30_000, 7_000))
