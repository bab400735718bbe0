"""The console script `clusterlob`: commands and their options, no logic.

Exit codes: 0 done, 1 the job failed, 2 bad usage, config or input.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import date, datetime
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clusterlob_gpu import __version__, heap
from clusterlob_gpu.errors import ClusterlobError, InputError

if TYPE_CHECKING:
    from clusterlob_gpu.backend import Name
    from clusterlob_gpu.config import Preset, RunConfig
    from clusterlob_gpu.files import Location
    from clusterlob_gpu.lake.synthetic import MarketConfig, SyntheticReport
    from clusterlob_gpu.pipeline import RunRequest
    from clusterlob_gpu.pipeline.run import Experiment
    from clusterlob_gpu.places import Place
    from clusterlob_gpu.workers import Progress

_YOUNG_OBJECTS = 100_000
"""Objects made before Python looks for garbage: its usual thousand make loading a tenth slower."""
_DAY = click.DateTime(["%Y-%m-%d"])

_PAGE_WIDTH = 150
"""Columns of a table that goes to a file or a pipe."""


def main() -> None:
    """Entry point: runs a command and turns its errors into one line and an exit code."""
    signal.signal(signal.SIGTERM, _stop)
    if hasattr(signal, "SIGCHLD"):
        # A parent may have left it ignored: then nobody could wait for what is started here.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    gc.set_threshold(_YOUNG_OBJECTS)
    # Matrices are small: threads would wait for each other.  Dask sets the same for its workers.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    heap.keep()
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except click.exceptions.Abort:
        click.echo("stopped; give the same command again to go on from the finished days", err=True)
        sys.exit(130)
    except ClusterlobError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        click.echo(f"error: {error.filename or 'input or output'}: {error.strerror or error}", err=True)
        sys.exit(1)
    finally:
        gc.freeze()  # at the end Python would look for garbage among all that was loaded, for half a second


def _stop(*_: object) -> None:
    """A termination is treated like Ctrl-C: what was begun is cleaned away."""
    raise KeyboardInterrupt


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="clusterlob")
def cli() -> None:
    """Cluster trades by the book they met, and test each cluster's flow."""


def _day(value: datetime | None) -> date | None:
    return None if value is None else value.date()


def location(text: str) -> Location:
    """A path, or s3://bucket/prefix."""
    from clusterlob_gpu.files import Location

    return Location.of(text)


def _local(value: Location, flag: str) -> Path:
    """The path of a location; raises InputError for an object store."""
    if value.path is None:
        raise InputError(f"{flag} {value}: must be a folder; make it there and copy it to the object store")
    return value.path


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def apply(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


def _draws(command: Callable[..., None]) -> Callable[..., None]:
    """Have helpers get ready for its tables and pictures while the command computes."""

    @wraps(command)
    def run(**options: Any) -> None:
        from clusterlob_gpu.beside import helpers

        with nullcontext() if options.get("dry_run") else helpers():
            _load_numba()
            command(**options)

    return run


def _load_numba() -> None:
    """Load Numba without SciPy's BLAS and without cffi: half a second, and no kernel here calls them.

    They are none the worse for it.  In a process that may have other kernels this would be wrong.
    """
    left_out = {"scipy.linalg.cython_blas", "cffi"} - sys.modules.keys()
    sys.modules |= dict.fromkeys(left_out)  # type: ignore[arg-type]  # an import of them fails at once
    try:
        import numba.core.typing.cffi_utils
        import numba.np.arraymath  # noqa: F401
    finally:
        for name in left_out:
            del sys.modules[name]


_LAKE = click.option(
    "--lake", type=location, required=True, help="Folder of the lake, or s3://bucket/prefix."
)
_RANGE = _options(
    _LAKE,
    click.option("--exchange", help="Exchange, as in the lake's partitions."),
    click.option("--symbol", "symbols", multiple=True, help="Instrument; may be given several times."),
    click.option("--start", type=_DAY, help="First day, YYYY-MM-DD."),
    click.option("--end", type=_DAY, help="Last day, included."),
    click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the run."),
)
_WHERE = _options(
    click.option("--workers", help="Number of local workers, a name in cluster_configs/, or a file."),
    click.option("--backend", type=click.Choice(["auto", "cpu", "gpu"]), default="auto"),
    click.option(
        "--store",
        type=location,
        help="Folder of day artefacts, or s3://bucket/prefix [default: beside --out].",
    ),
    click.option("--dry-run", is_flag=True, help="Show what is there and what would be done; do nothing."),
)
_RUNNING = _options(
    click.option("--config", "file", type=click.Path(path_type=Path), help="YAML file of config keys."),
    click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="One config key."),
    _WHERE,
)


@cli.group()
def ingest() -> None:
    """Bring data into a lake."""


@ingest.command("tardis")
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@_LAKE
@click.option("--exchange", "exchanges", multiple=True, help="Only these exchanges.")
@click.option("--symbol", "symbols", multiple=True, help="Only these instruments.")
@click.option("--start", type=_DAY, help="First day, YYYY-MM-DD.")
@click.option("--end", type=_DAY, help="Last day, included.")
@click.option(
    "--symbols-file",
    type=click.Path(exists=True, path_type=Path),
    help="CSV or Parquet with dim_symbol's columns: ticks, lots and increments are taken from it.",
)
def ingest_tardis(source: Path, lake: Location, symbols_file: Path | None, **limits: Any) -> None:
    """Ingest Tardis CSV files (.csv or .csv.gz) below SOURCE."""
    from clusterlob_gpu import console
    from clusterlob_gpu.lake import tardis

    with _progress() as step:
        done = tardis.ingest_tardis(
            source,
            _local(lake, "--lake"),
            exchanges=limits["exchanges"] or None,
            symbols=limits["symbols"] or None,
            start=_day(limits["start"]),
            end=_day(limits["end"]),
            symbol_table=symbols_file,
            progress=lambda at: step(f"{at.source}: {at.rows:,} rows", at.number - 1, at.of),
        )
    _print(*console.ingest_tables(done))


@ingest.command("synthetic")
@_LAKE
@click.option("--symbol", "symbols", multiple=True, default=("SYNUSDT",), help="Instruments to make.")
@click.option("--start", type=_DAY, default="2024-05-01", help="First day, YYYY-MM-DD.")
@click.option("--days", type=int, default=1, help="Days to make.")
@click.option("--trades-per-day", type=int, default=200_000)
@click.option("--snapshots-per-day", type=int, help="[default: one per 4.57 trades]")
@click.option("--seed", type=int, default=7)
@click.option("--strength", type=float, default=1.0, help="Of the planted types; 0 plants nothing.")
@click.option("--full-size", is_flag=True, help="BTCUSDT of May 2024: 3.95M trades, 864k snapshots a day.")
def ingest_synthetic(lake: Location, start: datetime, full_size: bool, **settings: Any) -> None:
    """Make a seeded market with planted types of traders."""
    _load_numba()
    from clusterlob_gpu.lake import synthetic

    config = synthetic.make_market(start=start.date(), full_size=full_size, **settings)
    click.echo(str(_make(_local(lake, "--lake"), config)))


def _make(lake: Path, config: MarketConfig) -> SyntheticReport:
    """Make a synthetic lake with a progress bar."""
    from clusterlob_gpu.lake import synthetic

    done = 0

    def count(day: synthetic.SyntheticDay) -> None:
        nonlocal done
        done += 1
        step(f"made {day.symbol} {day.day}", done, config.days * len(config.symbols))

    with _progress() as step:
        return synthetic.ingest_synthetic(lake, config, progress=count)


@cli.group()
def run() -> None:
    """Run an experiment."""


@run.command("cluster")
@_RANGE
@click.option("--preset", help="Experiment that comes with the package; options and --set override it.")
@_RUNNING
@_draws
def run_cluster(**options: Any) -> None:
    """Split trades into passive, opportunistic and directional flow, and test each."""
    from clusterlob_gpu.pipeline.cluster import CLUSTER

    preset = _preset(options["preset"])
    _finish(CLUSTER, _request(options, preset, _config(options, preset, "cluster")), options)


@run.command("flow")
@_RANGE
@click.option("--preset", help="Experiment that comes with the package; options and --set override it.")
@_RUNNING
@_draws
def run_flow(**options: Any) -> None:
    """Split taker flow by trade size, and test it against 1 h and 3 h forward returns."""
    from clusterlob_gpu.pipeline.flow import FLOW

    preset = _preset(options["preset"])
    _finish(FLOW, _request(options, preset, _config(options, preset, "flow")), options)


@cli.command("label")
@click.option("--model", type=click.Path(path_type=Path), required=True, help="model.json of a run.")
@_RANGE
@_RUNNING
@_draws
def label(model: Path, **options: Any) -> None:
    """Label days with a fitted model, without fitting."""
    from clusterlob_gpu import clustering
    from clusterlob_gpu.config import make_config, read_yaml
    from clusterlob_gpu.pipeline.cluster import LABEL, labelling_request

    models = clustering.read_models(model)
    first = next(iter(models.values()))
    options["symbols"] = options["symbols"] or tuple(models)
    options["exchange"] = options["exchange"] or first.exchange
    file = read_yaml(options["file"]) if options["file"] else {}
    config: RunConfig = make_config({**first.features, **file}, options["settings"])
    _finish(LABEL, labelling_request(_request(options, None, config, models=models)), options)


@cli.command("sweep")
@click.argument("file", type=click.Path(path_type=Path))
@_LAKE
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the sweep.")
@_WHERE
@_draws
def sweep(file: Path, **options: Any) -> None:
    """Run every trial of a YAML file over shared stages, and compare them."""
    from clusterlob_gpu import console
    from clusterlob_gpu import sweep as sweeps
    from clusterlob_gpu.workers import open_workers, read_place

    request = sweeps.SweepRequest(
        lake=options["lake"],
        out=options["out"],
        store=options["store"],
        backend=_backend(options),
        file=sweeps.read_sweep(file),
        keep_current=True,
    )
    if options["dry_run"]:
        with _progress() as step, open_workers(read_place(None), step) as workers:
            made, tallies, problems = sweeps.plan_sweep(request, workers)
        _print(*console.sweep_plan_tables(made, tallies, problems))
        return
    began = time.time()
    with _progress() as step, open_workers(_place(options, request.backend), step) as workers:
        out = sweeps.run_sweep(request, workers)
    _show_finished(out, began)


@cli.command("submit", context_settings={"ignore_unknown_options": True})
@click.option(
    "--to", "place", required=True, help="A SLURM or Kubernetes place in cluster_configs/, or a file."
)
@click.option("--dry-run", is_flag=True, help="Show the job instead of submitting it.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
def submit(place: str, dry_run: bool, command: tuple[str, ...]) -> None:
    """Run `clusterlob COMMAND` as a batch job of its own: submit --to slurm_gpu -- run cluster ..."""
    from clusterlob_gpu import submit as submission

    if dry_run:
        click.echo(submission.render_submission(place, list(command)))
    else:
        click.echo(f"submitted: {submission.submit(place, list(command))}")


@cli.command("parity")
@_LAKE
@click.option("--exchange", required=True, help="Exchange, as in the lake's partitions.")
@click.option("--symbol", required=True, help="Instrument.")
@click.option("--day", type=_DAY, required=True, help="First day, YYYY-MM-DD.")
@click.option("--last-day", type=_DAY, help="Last day, included [default: the first].")
@click.option("--config", "file", type=click.Path(path_type=Path), help="YAML file of config keys.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="One config key.")
def parity(
    file: Path | None, settings: tuple[str, ...], day: datetime, last_day: datetime | None, **where: Any
) -> None:
    """Compute a day on the CPU and on this machine's GPU, and show how far the results are apart."""
    import tempfile

    from clusterlob_gpu import backend, console
    from clusterlob_gpu import parity as both
    from clusterlob_gpu.config import read_yaml

    backend.choose("gpu")
    days = both.Day(first=day.date(), last=(last_day or day).date(), **where)
    with tempfile.TemporaryDirectory(prefix="clusterlob-") as folder:
        found = both.check(days, read_yaml(file) if file else {}, settings, Path(folder))
    _print(console.difference_table(found))
    if not all(one.ok for one in found):
        raise ClusterlobError("the two backends differ by more than is allowed")


@cli.command("report")
@click.argument("out", type=click.Path(exists=True, path_type=Path))
def report(out: Path) -> None:
    """Draw the pictures and the page of a finished run again."""
    from clusterlob_gpu import report as pages

    for path in pages.render_run(out):
        click.echo(str(path))


@cli.command("info")
@click.argument("where", type=location, metavar="RUN|STORE")
def info(where: Location) -> None:
    """Show the tables of a finished run, how far an unfinished one is, or what a store holds."""
    from clusterlob_gpu import console, output
    from clusterlob_gpu.store import Store

    attempt = output.unfinished(where.path) if where.path is not None else None
    if attempt is not None:
        click.echo(console.attempt_line(attempt))
    if where.path is not None and (where.path / output.RUN_FILE).exists():
        _show(where.path)
        return
    held = Store(where).held()
    if held:
        _print(console.store_table(where.name, held))
    elif attempt is None:
        raise InputError(f"{where}: neither a run nor a store with artefacts")


@cli.command("clean")
@click.argument("store", type=location)
@click.option("--unused", help="Remove what was not used for this long, such as 30d.")
@click.option("--max-size", help="Remove what was longest unused beyond this size, such as 200GB.")
@click.option("--dry-run", is_flag=True, help="Show what would be removed.")
def clean(store: Location, unused: str | None, max_size: str | None, dry_run: bool) -> None:
    """Remove day artefacts from a store by age or size; what was used within the last hour stays."""
    from clusterlob_gpu import console
    from clusterlob_gpu.config import parse_duration
    from clusterlob_gpu.store import Store

    if unused is None and max_size is None:
        raise InputError("clean: give --unused, --max-size, or both")
    gone = Store(store).clean(
        unused_s=None if unused is None else _asked("--unused", unused, parse_duration) / 1e6,
        max_bytes=None if max_size is None else _asked("--max-size", max_size, _bytes),
        dry_run=dry_run,
    )
    _print(console.store_table(f"{'would be ' if dry_run else ''}removed from {store}", gone))


def _asked(flag: str, text: str, parse: Callable[[str], int]) -> int:
    try:
        return parse(text)
    except ValueError as error:
        raise InputError(f"{flag} {text}: {error}") from None


def _bytes(text: str) -> int:
    from dask.utils import parse_bytes

    return int(parse_bytes(text))


@cli.command("check")
@_LAKE
@click.option("--exchange", help="Only this exchange.")
@click.option("--symbol", help="Only this instrument.")
def check(lake: Location, exchange: str | None, symbol: str | None) -> None:
    """List what a lake holds: days, rows, gaps, broken files, and signs of a wrong join."""
    from clusterlob_gpu import console, quality

    _print(*console.check_tables(quality.check_lake(lake, exchange, symbol)))


@cli.command("demo")
@click.option("--out", type=click.Path(path_type=Path), default="demo", help="Folder of the demo.")
@click.option("--workers", default="local_cpu", help="Number of local workers, a name, or a file.")
@_draws
def demo(out: Path, workers: str) -> None:
    """Make a small synthetic lake and run the whole experiment on it."""
    from clusterlob_gpu.config import make_config
    from clusterlob_gpu.lake import synthetic
    from clusterlob_gpu.pipeline.cluster import CLUSTER

    market = synthetic.demo_market()
    click.echo(f"lake: {_make(out / 'lake', market)}")
    options = {
        "lake": out / "lake",
        "exchange": market.exchange,
        "symbols": market.symbols,
        "start": datetime.combine(market.start, datetime.min.time()),
        "end": datetime.combine(market.end, datetime.min.time()),
        "out": out / "runs" / "cluster",
        "store": None,
        "backend": "cpu",
        "workers": workers,
        "dry_run": False,
    }
    _finish(CLUSTER, _request(options, None, make_config({})), options)


def _preset(name: str | None) -> Preset | None:
    from clusterlob_gpu.config import read_preset

    return None if name is None else read_preset(name)


def _config(options: dict[str, Any], preset: Preset | None, experiment: str) -> RunConfig:
    from clusterlob_gpu.config import ClusterConfig, FlowConfig, make_config, read_yaml

    if preset is not None and preset.experiment != experiment:
        raise InputError(f"--preset: is one of `run {preset.experiment}`, not of `run {experiment}`")
    file = read_yaml(options["file"]) if options["file"] else {}
    kind: type[RunConfig] = ClusterConfig if experiment == "cluster" else FlowConfig
    return make_config({**(preset.config if preset else {}), **file}, options["settings"], kind)


def _request(
    options: dict[str, Any], preset: Preset | None, config: RunConfig, models: Any = None
) -> RunRequest[Any]:
    from clusterlob_gpu.pipeline import RunRequest

    given = {
        "exchange": options["exchange"],
        "symbols": tuple(options["symbols"]),
        "start": _day(options["start"]),
        "end": _day(options["end"]),
    }
    for name, value in given.items():
        given[name] = value or (getattr(preset, name) if preset else None)
        if not given[name]:
            flag = "symbol" if name == "symbols" else name
            raise InputError(f"--{flag} is missing; give it, or a --preset")
    return RunRequest(
        lake=options["lake"],
        out=options["out"],
        store=options["store"],
        backend=_backend(options),
        config=config,
        models=models,
        published=preset.published if preset else None,
        keep_current=True,
        **given,
    )


def _backend(options: dict[str, Any]) -> Name:
    from clusterlob_gpu import backend
    from clusterlob_gpu.places import read_place

    return backend.choose(options["backend"], read_place(options["workers"]).gpus_there)


def _place(options: dict[str, Any], machine: Name) -> Place:
    """The place of --workers; where this process computes on a GPU, one task at a time has all of it."""
    from clusterlob_gpu.places import ThreadsPlace, read_place

    place = read_place(options["workers"])
    alone = machine == "gpu" and isinstance(place, ThreadsPlace)
    return ThreadsPlace(n_workers=1) if alone else place


def _finish(experiment: Experiment[Any], request: RunRequest[Any], options: dict[str, Any]) -> None:
    """Run an experiment on its workers and print its tables, or only its plan."""
    from clusterlob_gpu.pipeline.run import execute
    from clusterlob_gpu.workers import open_workers

    place = _place(options, request.backend)
    if options["dry_run"]:
        _show_plan(experiment, request, place)
        return
    began = time.time()
    with _progress() as step, open_workers(place, step) as workers:
        out = execute(request, experiment, workers)
    _show_finished(out, began)


def _show_plan(experiment: Experiment[Any], request: RunRequest[Any], place: Place) -> None:
    from clusterlob_gpu import console
    from clusterlob_gpu.pipeline.plan import plan_run
    from clusterlob_gpu.workers import open_workers, read_place

    with _progress() as step, open_workers(read_place(None), step) as workers:
        plan = plan_run(request, experiment, workers)
    _print(*console.plan_tables(plan))
    click.echo(console.memory_line(plan, place))


def _show_finished(out: Path, began: float) -> None:
    """The tables of a run that has just been made, or was found to need no making."""
    from clusterlob_gpu.output import RUN_FILE

    if (out / RUN_FILE).stat().st_mtime < began:
        click.echo("up to date: the same was asked for, and neither lake nor code has changed", err=True)
    _show(out)


def _show(out: Path) -> None:
    """Print the tables of a finished run, and where its report is."""
    from clusterlob_gpu import console, page, report

    held = page.read_info(out)
    _print(*report.console_tables(out), *console.run_tables(held))
    click.echo(f"report: {out / 'report.html'}")
    if (out / "plots").is_dir():
        click.echo(f"pictures: {out / 'plots'}")


@contextmanager
def _progress() -> Iterator[Progress]:
    """A progress bar on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("start", total=None)
        yield lambda stage, done, total: bar.update(task, description=stage, completed=done, total=total)


def _print(*tables: Any) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=_PAGE_WIDTH)
    for table in tables:
        console.print(table)
