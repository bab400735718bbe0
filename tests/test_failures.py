"""What fails on a real cluster: broken days, full disks, stores that refuse, processes killed with -9."""

from __future__ import annotations

import datetime as dt
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import S3

from clusterlob_gpu import pipeline
from clusterlob_gpu.config import make_config
from clusterlob_gpu.errors import ClusterlobError
from clusterlob_gpu.lake.layout import day_start_us
from clusterlob_gpu.lake.synthetic import ingest_synthetic, make_market
from clusterlob_gpu.output import read_ledger
from clusterlob_gpu.pipeline.stages import BadDaysError
from clusterlob_gpu.places import read_place
from clusterlob_gpu.workers import open_workers

DAYS = [dt.date(2024, 5, 1) + dt.timedelta(days=n) for n in range(5)]
SETTINGS = ["n_init=1", "bucket=30m", "horizons=[1h]"]
# Without pictures, which take most of the time of a small run.
MAIN = """
from clusterlob_gpu import cli, report
report.render_run = lambda _: []
cli.main()
"""
CLUSTERLOB = [sys.executable, "-c", MAIN]


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("failures") / "lake"
    ingest_synthetic(root, make_market(start=DAYS[0], days=5, trades_per_day=4_000, snapshots_per_day=9_000))
    return root


@pytest.fixture
def own(lake: Path, tmp_path: Path) -> Path:
    """A copy of the lake that a test may break; times of change are kept."""
    return shutil.copytree(lake, tmp_path / "lake")


def run(lake: Any, out: Path, *settings: str, store: Any = None, flow: bool = False, **more: Any) -> Path:
    from clusterlob_gpu.config import FlowConfig

    config = make_config(
        {},
        ["bar=30m", "min_trades=100", "horizons=[1h]", *settings] if flow else [*SETTINGS, *settings],
        **({"kind": FlowConfig} if flow else {}),
    )
    request = pipeline.RunRequest(
        lake=lake,
        exchange="synthetic",
        symbols=("BTCUSDT",),
        start=DAYS[0],
        end=DAYS[-1],
        out=out,
        store=store,
        config=config,
        pictures=False,
        **more,
    )
    with open_workers(read_place(None), lambda *_: None) as workers:
        return (pipeline.run_flow if flow else pipeline.run_cluster)(request, workers)


def results(out: Path) -> dict[str, bytes]:
    files = [*(out / "results").rglob("*.parquet"), *out.glob("model.json")]
    return {str(path.relative_to(out)): path.read_bytes() for path in files if path.is_file()}


def partition(lake: Path, table: str, day: dt.date) -> Path:
    (file,) = (lake / table / "exchange=synthetic" / f"date={day}").glob("*.parquet")
    return file


# ---- broken days ------------------------------------------------------------------------------------


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-300])


def flip_bits(file: Path) -> None:
    """In a page of a column that every run reads: the footer says nothing of it."""
    group = pq.read_metadata(file).row_group(0)
    columns = [group.column(at) for at in range(group.num_columns)]
    names = ("price_int", "bids_px.list.element")
    (column,) = (column for column in columns if column.path_in_schema in names)
    content = bytearray(file.read_bytes())
    for at in range(column.data_page_offset + column.total_compressed_size // 2, len(content))[:8]:
        content[at] ^= 0xFF
    file.write_bytes(content)


@pytest.mark.parametrize("flow", [False, True], ids=["cluster", "flow"])
@pytest.mark.parametrize("damage", [cut_off, flip_bits])
@pytest.mark.parametrize("name", ["trades", "book_snapshot_25"])
def test_broken_file__skipped_is_as_if_the_lake_did_not_have_it(
    own: Path, tmp_path: Path, name: str, damage: Any, flow: bool
) -> None:
    file = partition(own, name, DAYS[2])
    damage(file)
    skipped = run(own, tmp_path / "a" / "run", "on_bad_day=skip", flow=flow)
    record = json.loads((skipped / "run.json").read_text())
    (bad,) = record["bad_days"]
    assert (bad["symbol"], bad["table"], bad["day"]) == ("BTCUSDT", name, str(DAYS[2]))
    assert str(file) in bad["error"]
    assert any(note.startswith(f"BTCUSDT {DAYS[2]} was left out: ") for note in record["notes"])
    file.unlink()
    absent = run(own, tmp_path / "b" / "run", "on_bad_day=skip", flow=flow)
    assert json.loads((absent / "run.json").read_text())["bad_days"] == []
    assert results(skipped) == results(absent)


def test_broken_file__stops_the_run_after_the_other_days_are_done(own: Path, tmp_path: Path) -> None:
    """The days of a stage are all tried, the bad ones named; repaired, only what was not done is."""
    whole = partition(own, "book_snapshot_25", DAYS[1])
    shutil.copy2(whole, tmp_path / "whole")
    flip_bits(whole)
    flip_bits(partition(own, "book_snapshot_25", DAYS[3]))
    with pytest.raises(BadDaysError) as caught:
        run(own, tmp_path / "run")
    assert caught.value.exit_code == 2
    assert str(whole) in str(caught.value)
    assert str(caught.value).endswith(f" (bad as well: BTCUSDT {DAYS[3]})")
    assert "\n" not in str(caught.value)
    assert [line["status"] for line in read_ledger(tmp_path)] == ["failed"]
    assert not (tmp_path / "run").exists()
    shutil.copy2(tmp_path / "whole", whole)
    partition(own, "book_snapshot_25", DAYS[3]).unlink()
    out = run(own, tmp_path / "run", "on_bad_day=skip")
    books = json.loads((out / "run.json").read_text())["artefacts"]["book"]
    assert (books["there"], books["made"]) == (3, 1)


def test_broken_file__the_lake_is_looked_at_once_more_for_it_and_else_once(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, check = list[int](), pipeline.cluster.check_cluster
    monkeypatch.setattr(pipeline.cluster, "check_cluster", lambda *what: looks.append(1) or check(*what))
    run(own, tmp_path / "a" / "run", "on_bad_day=skip")
    assert len(looks) == 1
    flip_bits(partition(own, "trades", DAYS[2]))
    run(own, tmp_path / "b" / "run", "on_bad_day=skip")
    assert len(looks) == 3


def test_out_of_reach__is_not_a_bad_day(own: Path, tmp_path: Path) -> None:
    """An I/O error is nobody's missing day: with `skip` it would silently null one."""
    file = partition(own, "trades", DAYS[2])
    file.unlink()
    file.mkdir()  # reads of it fail with EISDIR, as root too
    with pytest.raises((OSError, ClusterlobError)) as caught:
        run(own, tmp_path / "run", "on_bad_day=skip")
    assert not isinstance(caught.value, BadDaysError)
    assert not (tmp_path / "run").exists()


# ---- object stores ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flow", [False, True], ids=["cluster", "flow"])
def test_s3__lake_and_store_give_the_results_of_folders(
    s3: S3, lake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flow: bool
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    there = s3.upload(lake, s3 / "lake")
    local = run(lake, tmp_path / "local", flow=flow)
    remote = run(there, tmp_path / "remote", store=s3 / "store", flow=flow)
    assert results(remote) == results(local)
    shutil.rmtree(tmp_path / "temporary")  # another machine has no cache
    again = run(there, tmp_path / "again", store=s3 / "store", flow=flow)
    made = {
        name: held["made"] for name, held in json.loads((again / "run.json").read_text())["artefacts"].items()
    }
    assert made == dict.fromkeys(made, 0)
    assert results(again) == results(local)


def test_s3__a_store_that_refuses_writes_is_told_before_anything_is_computed(
    s3: S3, lake: Path, tmp_path: Path
) -> None:
    s3.server.spoil = lambda line: "403 Forbidden" if line.startswith(("PUT", "POST")) else None
    with pytest.raises(ClusterlobError, match=r"--store s3://.*/store: cannot be written to \(") as caught:
        run(lake, tmp_path / "run", store=s3 / "store")
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_s3__a_store_that_refuses_midway_fails_the_run_and_nothing_else(
    s3: S3, lake: Path, tmp_path: Path
) -> None:
    s3.server.spoil = lambda line: (
        "403 Forbidden" if line.startswith("PUT") and "/features/" in line else None
    )
    with pytest.raises(OSError, match=r"s3://.*/features/"):
        run(lake, tmp_path / "run", store=s3 / "store")
    assert not (tmp_path / "run").exists()
    s3.server.spoil = lambda _: None
    out = run(lake, tmp_path / "run", store=s3 / "store")
    artefacts = json.loads((out / "run.json").read_text())["artefacts"]
    assert (artefacts["book"]["made"], artefacts["features"]["made"]) == (0, 5)
    assert results(out) == results(run(lake, tmp_path / "local"))


# ---- a full disk ------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk__fails_in_one_line_and_goes_on_where_there_is_room(
    lake: Path, tmp_path: Path, small_disk: Path
) -> None:
    asked = command(lake, tmp_path / "run", "--store", str(small_disk / "store"))
    failed = subprocess.run(asked, capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: ")
    assert "No space left on device" in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert list((small_disk / "store" / ".making").glob("*-*")) == []
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    again = subprocess.run(asked, capture_output=True, text=True, check=True)
    assert "error" not in again.stderr
    assert results(tmp_path / "run") == results(run(lake, tmp_path / "other", store=tmp_path / "other-store"))


# ---- killed with -9 ---------------------------------------------------------------------------------


def command(lake: Path, out: Path, *more: str) -> list[str]:
    where = ["--lake", str(lake), "--exchange", "synthetic", "--symbol", "BTCUSDT", "--out", str(out)]
    when = ["--start", str(DAYS[0]), "--end", str(DAYS[-1])]
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    return [*CLUSTERLOB, "run", "cluster", *where, *when, *settings, *more]


def descendants(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    return [one for child in map(int, found) for one in (child, *descendants(child))]


def workers_of(pid: int) -> list[int]:
    """Dask worker processes below a client."""

    def is_worker(process: int) -> bool:
        try:
            return b"spawn_main" in Path(f"/proc/{process}/cmdline").read_bytes()
        except OSError:
            return False

    return [process for process in descendants(pid) if is_worker(process)]


def progress(out: Path) -> str:
    try:
        held = json.loads((out.with_name(f".{out.name}.partial") / "progress.json").read_text())
    except (OSError, ValueError):
        return ""
    return str(held["stage"])


@pytest.fixture(scope="module")
def reference(lake: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return results(run(lake, tmp_path_factory.mktemp("reference") / "run"))


@pytest.mark.parametrize("kill", ["client", "worker"])
def test_killed__again_and_again_until_done_gives_the_same(
    lake: Path, tmp_path: Path, reference: dict[str, bytes], kill: str
) -> None:
    """Client: killed in three tries at random moments of the work.  Worker: killed while one run goes on."""
    rng, out, store = random.Random(kill), tmp_path / "run", tmp_path / "store"
    for strikes in (True, True, True, False):
        client = subprocess.Popen(command(lake, out, "--workers", "2"), stdout=subprocess.DEVNULL)
        if strikes and kill == "client":
            wait_for(lambda client=client: client.poll() is not None or progress(out) != "")
            time.sleep(rng.uniform(0, 1.5))
            below = descendants(client.pid)
            client.kill()
            client.wait()
            wait_for(lambda below=below: not any(is_alive(process) for process in below))
            continue
        if strikes:
            wait_for(lambda client=client: client.poll() is not None or any(store.glob("book/*/*/*")))
            os.kill(rng.choice(workers_of(client.pid)), signal.SIGKILL)
        assert client.wait(timeout=120) == 0
        break
    assert results(out) == reference
    assert [line["status"] for line in read_ledger(tmp_path)] == ["done"]


def test_killed_sweep__goes_on_and_writes_every_line_once(lake: Path, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    asked = {"exchange": "synthetic", "symbols": ["BTCUSDT"], "start": DAYS[0], "end": DAYS[-1]}
    grid = {"k": [2, 3], "window": [50, 100]}
    common = {"bucket": "30m", "horizons": ["1h"], "n_init": 1}
    file.write_text(yaml.safe_dump(asked | {"config": common, "grid": grid}))

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [*CLUSTERLOB, "sweep", str(file), "--lake", str(lake), "--out", str(out), "--workers", "2"]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL)

    whole = tmp_path / "whole" / "sweep"
    assert start(whole).wait() == 0
    out = tmp_path / "killed" / "sweep"
    client, ledger = start(out), out.parent / "logs" / "runs.jsonl"
    # The two trials of the first window are in the ledger, those of the second are not.
    wait_for(lambda: client.poll() is not None or (ledger.exists() and ledger.stat().st_size > 0))
    client.kill()
    client.wait()
    assert {line["trial"] for line in read_ledger(out.parent)} == {0, 2}
    assert start(out).wait() == 0
    assert results(out) == results(whole)
    lines = read_ledger(out.parent)
    assert sorted(line["trial"] for line in lines if "trial" in line) == [0, 1, 2, 3]
    assert len({line["id"] for line in lines}) == len(lines) == 5
    record = json.loads((out / "run.json").read_text())
    assert record["artefacts"]["book"]["made"] == 0


def wait_for(what: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.01)


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_interrupted__says_how_to_go_on(lake: Path, tmp_path: Path, reference: dict[str, bytes]) -> None:
    out = tmp_path / "run"
    client = subprocess.Popen(command(lake, out, "--workers", "1"), stderr=subprocess.PIPE, text=True)
    wait_for(lambda: client.poll() is not None or progress(out) != "")
    below = descendants(client.pid)
    client.send_signal(signal.SIGINT)
    _, said = client.communicate(timeout=60)
    assert client.returncode == 130
    assert said.strip() == "stopped; give the same command again to go on from the finished days"
    wait_for(lambda: not any(is_alive(process) for process in below))
    assert not out.with_name(".run.partial").exists()
    assert [line["status"] for line in read_ledger(tmp_path)] == ["interrupted"]
    subprocess.run(command(lake, out), check=True, stdout=subprocess.DEVNULL)
    assert results(out) == reference


# ---- nothing to do ----------------------------------------------------------------------------------


def test_finished_run__is_left_as_it_is_while_nothing_has_changed(own: Path, tmp_path: Path) -> None:
    def made_at(*settings: str) -> int:
        out = run(own, tmp_path / "run", *settings, keep_current=True)
        return (out / "run.json").stat().st_mtime_ns

    first = made_at()
    assert made_at() == first
    assert len(read_ledger(tmp_path)) == 1
    second = made_at("k=2")
    assert second > first
    file = partition(own, "trades", DAYS[0])
    os.utime(file, (file.stat().st_mtime + 60,) * 2)
    third = made_at("k=2")
    assert third > second
    why = json.loads((tmp_path / "run" / "run.json").read_text())["artefacts"]["features"]["why"]
    assert why == {"files changed": 1}
    # A day after the range that the lake did not have is looked at for the last returns.
    assert made_at("k=2") == third
    after = DAYS[-1] + dt.timedelta(days=1)
    for table in ("trades", "book_snapshot_25"):
        late = own / table / "exchange=synthetic" / f"date={after}"
        late.mkdir()
        day = day_start_us(after) - day_start_us(DAYS[-1])
        rows = pq.read_table(partition(own, table, DAYS[-1]))
        at = rows.schema.get_field_index("ts_local_us")
        moved = pa.array(rows["ts_local_us"].to_numpy() + day)
        pq.write_table(rows.set_column(at, rows.schema.field(at), moved), late / "x.parquet")
    assert made_at("k=2") > third


def test_finished_run__of_flow_is_made_again_when_a_market_changes(own: Path, tmp_path: Path) -> None:
    market = make_market(symbols=("ETHUSDT",), start=DAYS[0], days=5, trades_per_day=500, seed=8)

    def made_at() -> int:
        out = run(own, tmp_path / "run", flow=True, keep_current=True)
        return (out / "run.json").stat().st_mtime_ns

    first = made_at()
    assert made_at() == first
    ingest_synthetic(own, market)
    second = made_at()
    assert second > first
    assert made_at() == second
    (file,) = (own / "book_snapshot_25" / "exchange=synthetic" / f"date={DAYS[4]}").glob("ETHUSDT-*.parquet")
    os.utime(file, (file.stat().st_mtime + 60,) * 2)
    assert made_at() > second
