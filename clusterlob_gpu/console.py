"""Tables for the terminal about lakes: what was ingested, what is there."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from clusterlob_gpu.lake.tardis import FileReport, IngestReport
    from clusterlob_gpu.quality import LakeCheck


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
