"""Tables for the terminal about lakes, plans, runs and stores: what is there, and what was done."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from clusterlob_gpu.lake.tardis import FileReport, IngestReport
    from clusterlob_gpu.parity import Difference
    from clusterlob_gpu.pipeline.plan import Plan
    from clusterlob_gpu.pipeline.stages import Tally
    from clusterlob_gpu.places import Place
    from clusterlob_gpu.quality import LakeCheck
    from clusterlob_gpu.store import Held
    from clusterlob_gpu.sweep_trials import Trial


def table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """A titled table; columns whose every entry starts like a number are right-aligned."""
    made = Table(title=title, title_justify="left")
    for at, name in enumerate(columns):
        numeric = all(row[at][:1].isdigit() or row[at][:1] == "-" for row in rows)
        made.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def rows_table(run: dict[str, Any]) -> Table:
    """Rows of a run (the content of run.json): trades kept, trades and book rows dropped by reason."""
    columns = ["symbol", "trades", "kept", "labelled", "dropped", "book rows", "skipped"]
    rows = [
        [
            symbol,
            f"{counts['trades']:,}",
            f"{counts['kept']:,}",
            f"{counts['labelled']:,}" if "labelled" in counts else "-",
            _reasons(counts["dropped"]),
            f"{counts['book_rows']:,}",
            _reasons(counts["book_skipped"]),
        ]
        for symbol, counts in run["rows"].items()
    ]
    return table("rows", columns, rows)


def run_tables(run: dict[str, Any]) -> list[Table]:
    """What a run (the content of run.json) did with rows and artefacts."""
    tables = [rows_table(run)] if "rows" in run else []
    made = {name: held for name, held in run.get("artefacts", {}).items() if held["there"] or held["made"]}
    if made:
        tables.append(_artefact_table(made))
    bad = [[row["symbol"], row["table"], row["day"], row["error"]] for row in run.get("bad_days", [])]
    if bad:
        tables.append(table("days left out", ["symbol", "table", "day", "why"], bad))
    return tables


def _artefact_table(made: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = [
        [
            name,
            f"{held['there']:,}",
            f"{held['made']:,}",
            size_text(held["bytes"]),
            _because(held["why"]),
        ]
        for name, held in made.items()
    ]
    return table("artefacts", ["stage", "reused", "made", "size", "made because"], rows)


def _because(why: Mapping[str, int]) -> str:
    return _few([f"{reason} ({count})" for reason, count in why.items()])


def plan_tables(plan: Plan) -> list[Table]:
    """Days, gaps and bytes of every symbol, and what is there and missing of every stage."""
    symbols = [
        [
            symbol.symbol,
            str(len(symbol.days)),
            f"{symbol.days[0]} to {symbol.days[-1]}",
            _few([str(day) for day in symbol.gaps]) or "none",
            f"{symbol.trades:,}",
            f"{symbol.book_rows:,}",
            size_text(symbol.size),
            f"{symbol.largest[0]}: {size_text(symbol.largest[1])}",
        ]
        for symbol in plan.symbols
    ]
    columns = ["symbol", "days", "from", "gaps", "trades", "book rows", "in the lake", "largest task"]
    tables = [table(f"plan of run {plan.experiment}", columns, symbols)]
    stages = [
        [stage.stage, f"{stage.there:,}", f"{stage.missing:,}", _because(stage.why)]
        if stage.known
        else [stage.stage, "not known yet", f"up to {stage.missing:,}", ""]
        for stage in plan.stages
    ]
    tables.append(table("artefacts", ["stage", "there", "to be made", "because"], stages))
    if plan.left_out:
        tables.append(table("days left out", ["day"], [[text] for text in plan.left_out]))
    return tables


def difference_table(found: Sequence[Difference]) -> Table:
    """How far two backends are apart."""
    columns = ["quantity", "values", "largest difference", "allowed", ""]
    rows = [
        [
            one.quantity,
            f"{one.rows:,}",
            f"{one.found:.2g}",
            f"{one.allowed:.0e}",
            "ok" if one.ok else "DIFFERS",
        ]
        for one in found
    ]
    return table("cpu and gpu", columns, rows)


def memory_line(plan: Plan, place: Place) -> str:
    """What a worker of the place will take on the largest day, and whether it has that."""
    wanted = place.memory_for(plan.base_memory, plan.memory)
    text = f"memory: a worker of {place.describe()} takes about {size_text(wanted)}"
    limit = place.memory_per_worker
    if limit is None:
        return text
    if limit < wanted:
        return f"{text}, more than its {size_text(limit)}: give it more memory or fewer threads"
    return f"{text} of its {size_text(limit)}"


def sweep_plan_tables(
    trials: Sequence[Trial], tallies: Mapping[str, Tally], problems: Sequence[str]
) -> list[Table]:
    """Trials of a sweep, what is there and missing of every stage, and what cannot run."""
    rows = [
        [
            str(trial.number),
            ", ".join(f"{key} = {value}" for key, value in trial.settings.items()) or "the common settings",
            ", ".join(trial.symbols),
            trial.problem or "",
        ]
        for trial in trials
    ]
    tables = [table(f"{len(trials)} trials", ["trial", "settings", "symbols", "cannot run"], rows)]
    stages = [
        [name, f"{tally.there:,}", f"{tally.missing:,}", _because(tally.why)]
        for name, tally in tallies.items()
    ]
    columns = ["stage", "there", "to be made", "because"]
    tables.append(table("artefacts, as far as can be told", columns, stages))
    if problems:
        tables.append(table("trials that cannot run", ["why"], [[text] for text in problems]))
    return tables


def store_table(title: str, held: Sequence[Held]) -> Table:
    """Artefacts by stage: how many, how large, when last used."""
    now, rows = time.time(), []
    for stage in sorted({one.stage for one in held}):
        mine = [one for one in held if one.stage == stage]
        days = len({tuple(one.address.split("/")[1:3]) for one in mine})
        used = max(one.used for one in mine)
        rows.append(
            [
                stage,
                f"{len(mine):,}",
                f"{days:,}",
                size_text(sum(one.size for one in mine)),
                f"{(now - used) / 86_400:.1f} days ago",
                f"{sum(not one.whole for one in mine):,}",
            ]
        )
    columns = ["stage", "artefacts", "symbol days", "size", "last used", "not whole"]
    return table(f"{title}: {size_text(sum(one.size for one in held))}", columns, rows)


def attempt_line(attempt: Mapping[str, Any]) -> str:
    """How far a run is that is being made, or how far it came."""
    progress = attempt["progress"]
    where = f"{progress['stage']}, {progress['done']} of {progress['of']}" if progress else "the beginning"
    who = f"try {attempt['number']}, process {attempt['pid']} on {attempt['host']}"
    if attempt["running"]:
        since = f" {time.time() - progress['at']:.0f} s ago" if progress else ""
        return f"running: at {where}{since} ({who}, begun {attempt['started_at']})"
    return f"cut off at {where} ({who}); give the same command again to go on from the finished days"


def size_text(size: float) -> str:
    """Bytes in words: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"


def _reasons(counts: dict[str, int]) -> str:
    """Counts above zero by reason."""
    return ", ".join(f"{reason} {count:,}" for reason, count in counts.items() if count) or "none"


def ingest_tables(done: IngestReport) -> list[Table]:
    """What became of the source files, a row per symbol and table, and what was passed over."""
    groups: dict[tuple[str, str, str], list[FileReport]] = {}
    for file in done.files:
        groups.setdefault((file.exchange, file.symbol, file.table), []).append(file)
    columns = ["exchange", "symbol", "table", "days", "files", "rows in", "written", "latency", "counted"]
    title = (
        f"{len(done.files)} files, {done.unchanged} unchanged: {done.rows_in:,} rows in, "
        f"{done.rows_written:,} written in {done.seconds:.1f} s"
    )
    rows = [[*key, *_group_row(files)] for key, files in sorted(groups.items())]
    tables = [table(title, columns, rows)]
    if done.ignored:
        tables.append(table("passed over", ["file", "why"], [list(pair) for pair in done.ignored]))
    return tables


def _group_row(files: list[FileReport]) -> list[str]:
    """Days, files, rows, the range of the files' median latencies, and what was counted."""
    days = sorted(file.day for file in files)
    fresh = [file for file in files if not file.unchanged]
    counts: Counter[str] = Counter()
    for file in fresh:
        counts.update(file.anomalies)
    latencies = sorted(f.median_latency_us / 1000 for f in fresh if f.median_latency_us is not None)
    return [
        str(days[0]) if days[0] == days[-1] else f"{days[0]} to {days[-1]}",
        str(len(files)) if fresh else f"{len(files)} unchanged",
        f"{sum(file.rows_in for file in fresh):,}",
        f"{sum(file.rows_written for file in fresh):,}",
        f"{latencies[0]:,.0f} to {latencies[-1]:,.0f} ms" if latencies else "",
        ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items())),
    ]


def check_tables(found: LakeCheck) -> list[Table]:
    """Days, rows and gaps of every table, and the join of every day."""
    columns = ["exchange", "symbol", "table", "days", "from", "to", "rows", "gaps", "broken files"]
    held = [
        [
            check.exchange,
            check.symbol,
            check.table,
            str(len(check.days)),
            str(check.days[0]) if check.days else "",
            str(check.days[-1]) if check.days else "",
            f"{check.rows:,}",
            _few([str(day) for day in check.gaps]),
            _few(check.broken),
        ]
        for check in found.tables
    ]
    joined = [
        [
            check.exchange,
            check.symbol,
            check.book,
            str(check.day),
            f"{check.trades:,}",
            f"{check.book_rows:,}",
            ", ".join(f"{name} {count:,}" for name, count in check.skipped.items() if count),
            f"{check.touch_strict:.4f}",
            f"{check.touch_inclusive:.4f}",
            f"{check.buy_share:.3f}",
            f"{check.longest_book_gap_s:,.1f}",
        ]
        for check in found.days
    ]
    join_columns = ["exchange", "symbol", "book", "day", "trades", "book rows", "skipped", "at touch, strict"]
    join_columns += ["inclusive", "buys", "longest gap (s)"]
    return [
        table("tables", columns, held),
        table("trades against the book: share at or through the touch", join_columns, joined),
    ]


def _few(entries: list[str], most: int = 5) -> str:
    more = f" and {len(entries) - most} more" if len(entries) > most else ""
    return ", ".join(entries[:most]) + more
