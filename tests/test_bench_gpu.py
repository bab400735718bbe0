"""The benchmark of the GPU runs on the stand-in from end to end; the bundle keeps one architecture's code."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import standin

from clusterlob_gpu import backend, flow_kernels, kernels, returns
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
bundle = load("rapids_bundle")


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
    monkeypatch.setattr(passes, "BAR", US_PER_DAY // 4)
    for module in (passes, returns):
        monkeypatch.setattr(module, "MARKOUTS_US", returns.MARKOUTS_US[:1])
    sizes = "--days 1 --trades-per-day 180 --fold 1 --copy-mib 1 --repetitions 0 --threads 1"
    settings = "k=2 n_init=1 bucket=6h bar=6h horizons=[6h] refresh=bar threshold_window=6h min_trades=20"
    settings += " max_staleness=12h window=130"
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


def test_bench_gpu__without_a_device_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_why_no_gpu", lambda: "no CUDA device is visible")
    with pytest.raises(SystemExit) as stopped:
        bench.main([])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bench_gpu: --backend gpu: no CUDA device is visible")


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


def test_gpu_tests__work_on_the_stand_in() -> None:
    """Those that cost little: so that nothing but the device is new on a GPU."""
    pytest.importorskip("numba_cuda")
    clean = os.environ | standin.environment()
    cheap = "random_columns or reduce_book or flow__equals"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-q",
        "tests/test_gpu.py",
        "-k",
        cheap,
    ]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert f"{len(passes.PASSES) + 2} passed" in done.stdout


# ---- the bundle ---------------------------------------------------------------------------------------


def entry(kind: int, arch: int, payload: bytes) -> bytes:
    """An entry of a fat binary: kind 1 is PTX, 2 machine code."""
    return struct.pack("<HHIQ12xI", kind, 0x101, 64, len(payload), arch).ljust(64, b"\0") + payload


def fat_binary(*entries: bytes) -> bytes:
    held = b"".join(entries)
    return struct.pack("<IHHQ", bundle.FAT_BINARY, 1, 16, len(held)) + held


def library(code: bytes) -> bytearray:
    """A 64-bit ELF with its GPU code between two other sections."""
    names = b"\0.text\0.nv_fatbin\0.shstrtab\0"
    parts = [(0, b""), (1, b"host"), (7, code), (18, names)]
    body, table = bytearray(0x40), b""
    for name, content in parts:
        table += struct.pack("<IIQQQQ", name, 1, 0, 0, len(body), len(content)).ljust(64, b"\0")
        body += content
    body[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<Q10xHHH", body, 0x28, len(body), 64, len(parts), len(parts) - 1)
    return body + table


def test_prune__keeps_the_code_of_one_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "LEAST_CODE", 1)
    mine, other, ptx = entry(2, 90, b"m" * 40), entry(2, 80, b"o" * 72), entry(1, 90, b"p" * 24)
    before = fat_binary(other, mine, ptx) + bytes(8) + fat_binary(other)
    gone = len(other) + len(ptx)
    reduced = bytearray(fat_binary(mine)) + bytes(gone) + bytes(8) + fat_binary(other)
    given = library(before)
    assert bundle.prune(given, 90) == gone
    assert given == library(bytes(reduced))
    assert bundle.prune(given, 90) == 0
    assert bundle.prune(bytearray(b"no library"), 90) == 0


def test_prune__leaves_what_it_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries that do not end where their fat binary ends; and files with little GPU code."""
    mine, other = entry(2, 90, b"m" * 40), entry(2, 80, b"o" * 72)
    for code, least in ((fat_binary(other, mine, bytes(8)), 1), (fat_binary(other, mine), bundle.MIB)):
        monkeypatch.setattr(bundle, "LEAST_CODE", least)
        given = library(code)
        assert bundle.prune(given, 90) == 0
        assert given == library(code)


def test_divide__runs_within_the_limit() -> None:
    assert bundle.divide([3, 3, 4, 9, 1, 1], 10) == [[0, 1, 2], [3, 4], [5]]
    assert bundle.divide([], 10) == []


def test_write_bundle__pieces_unpack_to_the_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what is left out, whole after all pieces, with sums that hold."""
    monkeypatch.setattr(bundle, "BIG_FILE", 5000)
    rng, held = np.random.default_rng(3), {}
    for name in ("one", "two"):
        held |= {f"{name}/core.so": rng.bytes(6000), f"{name}/__init__.py": b"x = 1\n"}
        with zipfile.ZipFile(tmp_path / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            for path, content in held.items():
                if path.startswith(name):
                    wheel.writestr(path, content)
            wheel.writestr(f"{name}/include/api.h", b"gone")
    units = [unit for name in ("one", "two") for unit in bundle.units_of(name, [*tmp_path.glob(f"{name}-*")])]
    streams = [bundle.compress(unit, 90) for unit in units]
    out = tmp_path / "out"
    out.mkdir()
    bundle.write_bundle(out, units, streams, 8000)
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=out, check=True)
    found = {}
    for piece in sorted(out.glob("*.tar.xz")):
        assert piece.stat().st_size <= 8000
        with tarfile.open(piece) as tar:
            found |= {one.name: tar.extractfile(one).read() for one in tar}  # type: ignore[union-attr]
    assert found == held
    assert (out / "MANIFEST.txt").read_text().splitlines()[0] == "rapids-1-one.tar.xz one 1.0"
    subprocess.run(["bash", "-n", out / "install_bundle.sh"], check=True)
    with pytest.raises(SystemExit, match="raise --piece-mib"):
        bundle.write_bundle(out, units, streams, 3000)
