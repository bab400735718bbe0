"""What the benchmarks share: lakes, commands in fresh processes, and what those cost.

Memory is the sum of the proportional set sizes (PSS) of a command and all its children: a page that several
processes map counts once.  Pages of mapped files count while they are mapped; `own` leaves them out.  Bytes
read of a lake are its pages in the system's page cache after a run that began without any.
"""

import cProfile
import ctypes
import gzip
import json
import mmap
import os
import pstats
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import date, timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv

CLUSTERLOB = Path(sys.executable).with_name("clusterlob")
EXCHANGE, SYMBOL, START = "synthetic", "BTCUSDT", date(2024, 5, 1)
FULL_TRADES = 3_950_000
"""Trades of a day with `--full-size`."""
TASK_BYTES = 5_000
"""What a task of a day carries, pickled: 1 to 10 kB, its symbol, book, state and features."""

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # commands find the package compiled, as after any first run

_PAGE = mmap.PAGESIZE
_LEAST_S = 0.05
"""Time between two looks at a command's memory; a twentieth of the time goes into looking at most."""


def make_lake(root: Path, days: int, trades: int = FULL_TRADES) -> Path:
    """A synthetic lake with exactly so many days: links to the files of one that is made once.

    A run looks at the day after its range where the lake has it, which would blur a cost per day.
    """
    whole, lake = root / f"lake-{trades}", root / f"lake-{trades}-{days}"
    if not partition(whole, "trades", days - 1).exists():
        size = ["--full-size"] if trades == FULL_TRADES else ["--trades-per-day", trades]
        market = ["--symbol", SYMBOL, "--start", START, "--days", days, *size]
        run([CLUSTERLOB, "ingest", "synthetic", "--lake", whole, *market])
        for view in root.glob(f"lake-{trades}-*"):
            shutil.rmtree(view)
    if not lake.exists():
        beyond = {partition(whole, "trades", number).name for number in range(days, 400)}
        shutil.copytree(whole, lake, copy_function=os.link, ignore=lambda _, names: beyond & set(names))
    return lake


def partition(lake: Path, table: str, number: int) -> Path:
    """Folder of a day of a table."""
    return lake / table / f"exchange={EXCHANGE}" / f"date={day_number(number)}"


def day_number(number: int) -> date:
    """Days of the benchmark are counted from 0."""
    return START + timedelta(days=number)


def range_options(lake: Path, days: int) -> list[Any]:
    """Options of a run over the first days of a lake."""
    which = ["--lake", lake, "--exchange", EXCHANGE, "--symbol", SYMBOL]
    return [*which, "--start", START, "--end", day_number(days - 1)]


def make_tardis(root: Path, lake: Path, table: str, rows: int) -> Path:
    """The first rows of a day of a lake as a Tardis tree of one file, made once."""
    tree_ = root / f"tardis-{table}-{rows}"
    path = tree_ / "binance-futures" / table / f"{START:%Y/%m/%d}" / f"{SYMBOL}.csv.gz"
    if not path.exists():
        (source,) = partition(lake, table, 0).glob("*.parquet")
        columns = _tardis_columns(pq.read_table(source).slice(0, rows))
        path.parent.mkdir(parents=True)
        with path.open("wb") as file, gzip.GzipFile(fileobj=file, mode="wb", compresslevel=6, mtime=0) as out:
            out.write((",".join(columns) + "\n").encode())
            csv.write_csv(
                pa.table(columns), out, csv.WriteOptions(include_header=False, quoting_style="none")
            )
    return tree_


def _tardis_columns(table: pa.Table) -> dict[str, Any]:
    """Columns of a Tardis file from those of a lake's `trades` or `book_snapshot_25`."""
    same = {"exchange": "binance-futures", "symbol": SYMBOL}
    columns: dict[str, Any] = {name: pa.array([text] * len(table)) for name, text in same.items()}
    columns |= {"timestamp": table["ts_exch_us"], "local_timestamp": table["ts_local_us"]}
    if "side" in table.column_names:
        sides = pa.array(["buy", "sell", "unknown"]).take(table["side"].combine_chunks())
        units = {"price": pc.divide(table["price_int"], 10.0), "amount": pc.divide(table["qty_int"], 1000.0)}
        return columns | {"id": table["trade_id"], "side": sides} | units
    levels = {
        name: pc.list_flatten(table[name]).to_numpy().reshape(len(table), -1)
        for name in ("asks_px", "asks_sz", "bids_px", "bids_sz")
    }
    for level in range(levels["asks_px"].shape[1]):
        for side in ("asks", "bids"):
            columns[f"{side}[{level}].price"] = levels[f"{side}_px"][:, level] / 10
            columns[f"{side}[{level}].amount"] = levels[f"{side}_sz"][:, level] / 1000
    return columns


# ---- commands ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timed:
    """What a command took, start-up included."""

    seconds: float
    cpu_s: float


@dataclass(frozen=True)
class Observed:
    """What a command used while it was watched; it ran from a cold page cache if a lake was given."""

    seconds: float
    peak_mib: float
    """Largest sum over all processes (PSS)."""
    own_mib: float
    """The same without pages of files."""
    client_mib: float
    """Peak of the command's own process (VmHWM)."""
    worker_mib: float
    """Largest peak of a child."""
    read_mib: float | None
    """Read of the lake; None where the page cache cannot be emptied."""


class _Process:
    """A command whose output is kept for the case that it fails."""

    def __init__(self, command: Sequence[Any]) -> None:
        self.command = [str(part) for part in command]
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 - `ended` closes it
        self.began = time.perf_counter()
        self.popen = subprocess.Popen(self.command, stdout=self.output, stderr=subprocess.STDOUT)

    def ended(self, flags: int = 0) -> Timed | None:
        """What it took; None while it runs (with WNOHANG).  Ends the benchmark if it failed."""
        pid, status, usage = os.wait4(self.popen.pid, flags)
        if pid == 0:
            return None
        seconds = time.perf_counter() - self.began
        self.popen.returncode = os.waitstatus_to_exitcode(status)
        with self.output:
            self.output.seek(0)
            if self.popen.returncode:
                sys.exit(f"{' '.join(self.command)}:\n{self.output.read().decode()[-4000:]}")
        return Timed(seconds, usage.ru_utime + usage.ru_stime)


def run(command: Sequence[Any]) -> Timed:
    """Run a command, not looking at it; the time of its children is part of its own."""
    timed = _Process(command).ended()
    assert timed is not None
    return timed


def observe(command: Sequence[Any], lake: Path | None = None) -> Observed:
    """Run a command and watch its memory, and what it reads of a lake."""
    measurable = lake is not None and forget(lake)
    process, peaks = _Process(command), _Peaks()
    while (timed := process.ended(os.WNOHANG)) is None:
        began = time.perf_counter()
        peaks.look(process.popen.pid)
        time.sleep(max(_LEAST_S, 20 * (time.perf_counter() - began)))
    read = resident(lake) / 2**20 if lake is not None and measurable else None
    client, worker = peaks.single[process.popen.pid], peaks.of_others(process.popen.pid)
    return Observed(timed.seconds, peaks.total, peaks.own, client, worker, read)


@dataclass
class _Peaks:
    """Largest memory so far, MiB."""

    total: float = 0.0
    own: float = 0.0
    single: dict[int, float] = field(default_factory=lambda: defaultdict(float))

    def look(self, pid: int) -> None:
        held = [(one, _memory(one)) for one in tree(pid)]
        self.total = max(self.total, sum(memory["Pss"] for _, memory in held))
        self.own = max(self.own, sum(memory["Pss_Anon"] + memory["Pss_Shmem"] for _, memory in held))
        for one, memory in held:
            self.single[one] = max(self.single[one], memory["VmHWM"])

    def of_others(self, pid: int) -> float:
        return max((peak for one, peak in self.single.items() if one != pid), default=0.0)


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.Error:
        return [pid]


def _memory(pid: int) -> dict[str, float]:
    """Sizes of a process in MiB, nothing for one that has ended."""
    sizes: dict[str, float] = defaultdict(float)
    for file in ("smaps_rollup", "status"):
        try:
            lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
        except OSError:
            continue
        words = [line.split() for line in lines if line.endswith(" kB")]
        sizes |= {name.rstrip(":"): int(size) / 1024 for name, size, _ in words}
    return sizes


def forget(folder: Path) -> bool:
    """Take the files below a folder out of the page cache; whether that worked."""
    for path in _files(folder):
        with path.open("rb") as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return resident(folder) == 0


def resident(folder: Path) -> int:
    """Bytes of the files below a folder that are in the page cache."""
    return sum(_resident_pages(path) for path in _files(folder)) * _PAGE


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size)


def _resident_pages(path: Path) -> int:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // _PAGE))()
        start = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.byref(start), ctypes.c_size_t(len(mapped)), pages
        )
        del start  # or the file could not be unmapped
        if failed:
            raise OSError(ctypes.get_errno(), "mincore", str(path))
        return sum(page & 1 for page in bytes(pages))


# ---- inside the package -----------------------------------------------------------------------------


def dask_overheads(workers: int = 2, n_items: int = 20_000) -> dict[str, float]:
    """Seconds that Dask takes for items with which nothing is done, run as the package runs its own.

    start_s: until workers answer; submit_s: of an item, before the first task of its stage ends; task_s: of a
    task, of many items or of one, after that; round_trip_s: of a single item.
    """
    from clusterlob_gpu.workers import Place, open_workers

    ends: list[float] = []

    def note(_stage: str, done: int, _of: int) -> None:
        if done:
            ends.append(time.perf_counter())

    place, items = Place(kind="local", n_workers=workers), [os.urandom(TASK_BYTES) for _ in range(n_items)]
    began = time.perf_counter()
    with open_workers(place, note) as running:
        running.map("start", len, items[:1])
        started = time.perf_counter()
        for _ in range(20):
            running.map("single", len, items[:1])
        single = (time.perf_counter() - started) / 20
        ends.clear()
        submitted = time.perf_counter()
        running.map("many", len, items)
    first, last = ends[0], ends[-1]
    return {
        "start_s": started - began,
        "submit_s": max(0.0, first - submitted - single) / n_items,
        "task_s": (last - first) / max(1, len(ends) - 1),
        "round_trip_s": single,
    }


class Serial:
    """Workers that are none: tasks run here, one after the other, where they can be timed and profiled."""

    name = "one after the other"

    def __init__(self) -> None:
        self.progress: Callable[[str, int, int], None] = lambda *_: None
        self.stages: dict[str, dict[str, float]] = {}

    def map(
        self,
        stage: str,
        function: Callable[[Any], Any],
        items: Sequence[Any],
        home: Any = None,  # noqa: ARG002
    ) -> list[Any]:
        began = time.perf_counter()
        results = [function(item) for item in items]
        held = self.stages.setdefault(stage, {"calls": 0, "tasks": 0, "seconds": 0.0})
        held["calls"] += 1
        held["tasks"] += len(items)
        held["seconds"] += time.perf_counter() - began
        return results


def _serially(experiment: str, lake: Path, days: int, out: Path, call: Callable[..., Any]) -> Serial:
    """Run an experiment in this process, through `call(function, request, workers)`."""
    from clusterlob_gpu import pipeline
    from clusterlob_gpu.config import ClusterConfig, FlowConfig, make_config

    cluster, workers = experiment == "cluster", Serial()
    request = pipeline.RunRequest(
        lake=lake,
        exchange=EXCHANGE,
        symbols=(SYMBOL,),
        start=START,
        end=day_number(days - 1),
        out=out,
        config=make_config({}, (), ClusterConfig if cluster else FlowConfig),
    )
    call(pipeline.run_cluster if cluster else pipeline.run_flow, request, workers)
    return workers


def stage_costs(experiment: str, lake: Path, days: int, out: Path) -> dict[str, Any]:
    """Seconds of a core in the tasks of every stage, and of the client between them; for a fresh process."""
    workers = _serially(experiment, lake, days, out, lambda function, *what: function(*what))
    held = json.loads((out / "run.json").read_text())
    client = {name: held["timings"].get(name, 0.0) for name in ("evaluate", "report")}
    client["evaluate"] = max(0.0, client["evaluate"] - workers.stages["tables"]["seconds"])
    between = held["seconds"] - sum(client.values()) - sum(one["seconds"] for one in workers.stages.values())
    return {"days": days, "stages": workers.stages, "client": client | {"between": max(0.0, between)}}


def profile_run(experiment: str, lake: Path, days: int, out: Path) -> str:
    """Run an experiment under cProfile and tell where the time went; for a fresh process."""
    profile = cProfile.Profile()
    _serially(experiment, lake, days, out, profile.runcall)
    with tempfile.TemporaryFile("w+") as text:
        table = pstats.Stats(profile, stream=text)
        table.sort_stats("tottime").print_stats(25)
        table.sort_stats("cumulative").print_stats("clusterlob_gpu", 40)
        text.seek(0)
        return text.read().replace(f"{Path(__file__).parents[1]}/", "").replace(f"{sys.prefix}/", "")


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process that has imported nothing yet."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(function, *arguments).result()


def import_times(module: str, least_s: float = 0.02) -> list[tuple[str, float]]:
    """Seconds that importing a module takes in each package, most first."""
    command = [sys.executable, "-X", "importtime", "-c", f"import {module}"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()
    seconds: dict[str, float] = defaultdict(float)
    for line in lines:
        own, _, name = line.removeprefix("import time:").split("|")
        if own.strip().isdigit():
            seconds[name.strip().partition(".")[0]] += int(own) / 1e6
    return sorted((item for item in seconds.items() if item[1] >= least_s), key=lambda item: -item[1])
