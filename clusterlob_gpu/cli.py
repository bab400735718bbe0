"""The console script `clusterlob`: commands and their options, no logic.

Exit codes: 0 done, 1 the job failed, 2 bad usage, config or input.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clusterlob_gpu import __version__
from clusterlob_gpu.errors import ClusterlobError, InputError

if TYPE_CHECKING:
    from clusterlob_gpu.config import Preset, RunConfig
    from clusterlob_gpu.lake.synthetic import MarketConfig, SyntheticReport
    from clusterlob_gpu.pipeline import RunRequest
    from clusterlob_gpu.workers import Progress

_DAY = click.DateTime(["%Y-%m-%d"])

_PAGE_WIDTH = 150
"""Columns of a table that goes to a file or a pipe."""


def main() -> None:
    """Entry point: runs a command and turns its errors into one line and an exit code."""
    signal.signal(signal.SIGTERM, _stop)
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


def _stop(*_: object) -> None:
    """A termination is treated like Ctrl-C: what was begun is cleaned away."""
    raise KeyboardInterrupt


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="clusterlob")
def cli() -> None:
    """Cluster trades by the book they met, and test each cluster's flow."""


def _day(value: datetime | None) -> date | None:
    return None if value is None else value.date()


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def apply(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


_RANGE = _options(
    click.option("--lake", type=click.Path(path_type=Path), required=True, help="Folder of the lake."),
    click.option("--exchange", help="Exchange, as in the lake's partitions."),
    click.option("--symbol", "symbols", multiple=True, help="Instrument; may be given several times."),
    click.option("--start", type=_DAY, help="First day, YYYY-MM-DD."),
    click.option("--end", type=_DAY, help="Last day, included."),
    click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the run."),
)
_RUNNING = _options(
    click.option("--config", "file", type=click.Path(path_type=Path), help="YAML file of config keys."),
    click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="One config key."),
    click.option("--workers", help="Number of local workers, a name in cluster_configs/, or a file."),
    click.option("--backend", type=click.Choice(["auto", "cpu", "gpu"]), default="auto"),
    click.option(
        "--store", type=click.Path(path_type=Path), help="Folder of day artefacts [default: beside --out]."
    ),
)


@cli.group()
def ingest() -> None:
    """Bring data into a lake."""


@ingest.command("tardis")
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.option("--lake", type=click.Path(path_type=Path), required=True, help="Folder of the lake.")
@click.option("--exchange", "exchanges", multiple=True, help="Only these exchanges.")
@click.option("--symbol", "symbols", multiple=True, help="Only these instruments.")
@click.option("--start", type=_DAY, help="First day, YYYY-MM-DD.")
@click.option("--end", type=_DAY, help="Last day, included.")
@click.option(
    "--symbols-file",
    type=click.Path(exists=True, path_type=Path),
    help="CSV or Parquet with dim_symbol's columns: ticks, lots and increments are taken from it.",
)
def ingest_tardis(source: Path, lake: Path, symbols_file: Path | None, **limits: Any) -> None:
    """Ingest Tardis CSV files (.csv or .csv.gz) below SOURCE."""
    from clusterlob_gpu import console
    from clusterlob_gpu.lake import tardis

    with _progress() as step:
        done = tardis.ingest_tardis(
            source,
            lake,
            exchanges=limits["exchanges"] or None,
            symbols=limits["symbols"] or None,
            start=_day(limits["start"]),
            end=_day(limits["end"]),
            symbol_table=symbols_file,
            progress=lambda at: step(f"{at.source}: {at.rows:,} rows", at.number - 1, at.of),
        )
    _print(*console.ingest_tables(done))


@ingest.command("synthetic")
@click.option("--lake", type=click.Path(path_type=Path), required=True, help="Folder of the lake.")
@click.option("--symbol", "symbols", multiple=True, default=("SYNUSDT",), help="Instruments to make.")
@click.option("--start", type=_DAY, default="2024-05-01", help="First day, YYYY-MM-DD.")
@click.option("--days", type=int, default=1, help="Days to make.")
@click.option("--trades-per-day", type=int, default=200_000)
@click.option("--snapshots-per-day", type=int, help="[default: one per 4.57 trades]")
@click.option("--seed", type=int, default=7)
@click.option("--strength", type=float, default=1.0, help="Of the planted types; 0 plants nothing.")
@click.option("--full-size", is_flag=True, help="BTCUSDT of May 2024: 3.95M trades, 864k snapshots a day.")
def ingest_synthetic(lake: Path, start: datetime, full_size: bool, **settings: Any) -> None:
    """Make a seeded market with planted types of traders."""
    from clusterlob_gpu.lake import synthetic

    config = synthetic.make_market(start=start.date(), full_size=full_size, **settings)
    click.echo(str(_make(lake, config)))


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
def run_cluster(**options: Any) -> None:
    """Split trades into passive, opportunistic and directional flow, and test each."""
    from clusterlob_gpu import pipeline

    preset = _preset(options["preset"])
    _finish(pipeline.run_cluster, _request(options, preset, _config(options, preset, "cluster")), options)


@run.command("flow")
@_RANGE
@click.option("--preset", help="Experiment that comes with the package; options and --set override it.")
@_RUNNING
def run_flow(**options: Any) -> None:
    """Split taker flow by trade size, and test it against 1 h and 3 h forward returns."""
    from clusterlob_gpu import pipeline

    preset = _preset(options["preset"])
    _finish(pipeline.run_flow, _request(options, preset, _config(options, preset, "flow")), options)


@cli.command("label")
@click.option("--model", type=click.Path(path_type=Path), required=True, help="model.json of a run.")
@_RANGE
@_RUNNING
def label(model: Path, **options: Any) -> None:
    """Label days with a fitted model, without fitting."""
    from clusterlob_gpu import clustering, pipeline
    from clusterlob_gpu.config import make_config, read_yaml

    models = clustering.read_models(model)
    first = next(iter(models.values()))
    options["symbols"] = options["symbols"] or tuple(models)
    options["exchange"] = options["exchange"] or first.exchange
    file = read_yaml(options["file"]) if options["file"] else {}
    config: RunConfig = make_config({**first.features, **file}, options["settings"])
    request = _request(options, None, config, models=models)
    _finish(pipeline.label, request, options)


@cli.command("report")
@click.argument("out", type=click.Path(exists=True, path_type=Path))
def report(out: Path) -> None:
    """Draw the pictures and the page of a finished run again."""
    from clusterlob_gpu import report as pages

    for path in pages.render_run(out):
        click.echo(str(path))


@cli.command("info")
@click.argument("out", type=click.Path(exists=True, path_type=Path))
def info(out: Path) -> None:
    """Show the tables of a finished run."""
    _show(out)


@cli.command("check")
@click.option(
    "--lake", type=click.Path(exists=True, path_type=Path), required=True, help="Folder of the lake."
)
@click.option("--exchange", help="Only this exchange.")
@click.option("--symbol", help="Only this instrument.")
def check(lake: Path, exchange: str | None, symbol: str | None) -> None:
    """List what a lake holds: days, rows, gaps, broken files, and signs of a wrong join."""
    from clusterlob_gpu import console, quality

    _print(*console.check_tables(quality.check_lake(lake, exchange, symbol)))


@cli.command("demo")
@click.option("--out", type=click.Path(path_type=Path), default="demo", help="Folder of the demo.")
@click.option("--workers", default="local_cpu", help="Number of local workers, a name, or a file.")
def demo(out: Path, workers: str) -> None:
    """Make a small synthetic lake and run the whole experiment on it."""
    from clusterlob_gpu import pipeline
    from clusterlob_gpu.config import make_config
    from clusterlob_gpu.lake import synthetic

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
    }
    _finish(pipeline.run_cluster, _request(options, None, make_config({})), options)


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
    from clusterlob_gpu import backend
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
        backend=backend.choose(options["backend"]),
        config=config,
        models=models,
        published=preset.published if preset else None,
        **given,
    )


def _finish(job: Callable[..., Path], request: RunRequest[Any], options: dict[str, Any]) -> None:
    """Run a job on its workers and print its tables."""
    from clusterlob_gpu.workers import open_workers, read_place

    place = read_place(options["workers"])
    with _progress() as step, open_workers(place, step) as workers:
        out = job(request, workers)
    _show(out)


def _show(out: Path) -> None:
    """Print the tables of a finished run, and where its report is."""
    from clusterlob_gpu import console, page, report

    _print(*report.console_tables(out), console.rows_table(page.read_info(out)))
    click.echo(f"report: {out / 'report.html'}")
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
