"""What every report is made of: numbers as text, tables for the terminal, one self-contained page."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from rich.table import Table

from clusterlob_gpu.errors import InputError
from clusterlob_gpu.store import read_frame

NOTHING = "-"


def read_info(out: Path) -> dict[str, Any]:
    """run.json of a run directory; raises InputError, naming the file, if it cannot be read."""
    path = Path(out) / "run.json"
    try:
        info: dict[str, Any] = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; pass the --out of a run") from None
    except ValueError:
        raise InputError(f"{path}: not valid JSON; repeat the run") from None
    return info


def read_results(out: Path, name: str) -> pd.DataFrame:
    """A table of results; raises InputError, naming the file, if it is missing."""
    path = out / "results" / f"{name}.parquet"
    if not path.exists():
        raise InputError(f"{path}: is missing; the run has not finished, repeat it")
    return read_frame(path)


def number(value: Any, form: str) -> str:
    """The value, or a dash for null."""
    if value is None or pd.isna(value):
        return NOTHING
    return format(value, form)


def interval(row: pd.Series, low: str, high: str, form: str) -> str:
    """`low to high`, or a dash for null."""
    if pd.isna(row[low]) or pd.isna(row[high]):
        return NOTHING
    return f"{row[low]:{form}} to {row[high]:{form}}"


def counted(counts: Mapping[str, int]) -> str:
    """`3 non positive, 41 crossed`: what was counted at all."""
    return ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in counts.items() if count)


def text_table(title: str, rows: list[dict[str, str]]) -> Table:
    """A table for the terminal, a line per row; columns of numbers are right-aligned."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in rows[0]:
        cells = [row[name] for row in rows]
        numeric = all(map(is_numeric, cells))
        # Where room is short headings wrap, cells do not: a row is a line.
        whole = any(" " in cell for cell in cells)
        table.add_column(name, justify="right" if numeric else "left", no_wrap=whole)
    for row in rows:
        table.add_row(*row.values())
    return table


def ic_cells(row: pd.Series) -> dict[str, str]:
    """What every table of ICs says of a row of `evaluation.ic_table`, as text."""
    return {
        "n": number(row["n"], ",.0f"),
        "IC": number(row["ic"], "+.4f"),
        "verdict": str(row["verdict"]),
        "95 % interval": interval(row, "ci_low", "ci_high", "+.3f"),
        "rank IC": number(row["rank_ic"], "+.4f"),
        "HAC t": number(row["hac_t"], "+.2f"),
        "lags": number(row["lags"], "d"),
        "p corrected": number(row["p_fdr"], ".3f"),
        "MDE": number(row["mde"], ".3f"),
    }


def is_numeric(text: str) -> bool:
    """Whether a cell holds a number, an interval, or nothing."""
    number = r"[-+]?[\d.,]+(e[-+]?\d+)?%?"
    return text == NOTHING or re.fullmatch(f"{number}( to {number})?", text) is not None


def png(figure: Figure) -> bytes:
    """The picture's file; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def write(path: Path, content: bytes) -> None:
    """Write a file that appears only when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def draw(
    out: Path, symbol: str, figures: Iterable[tuple[str, Figure]], captions: Mapping[str, str]
) -> tuple[list[Path], list[tuple[str, str, str]]]:
    """Write plots/<name>_<symbol>.png; gives the files, and name, caption and base64 of each for the page."""
    files, images = [], []
    for name, figure in figures:
        image = png(figure)
        path = out / "plots" / f"{name}_{re.sub(r'[^A-Za-z0-9._-]', '_', symbol)}.png"
        write(path, image)
        files.append(path)
        images.append((name, captions[name], base64.b64encode(image).decode("ascii")))
    return files, images


def page(template: str, info: dict[str, Any], sections: list[Any]) -> bytes:
    """The page of a run, from a template of the package."""
    environment = Environment(
        loader=PackageLoader("clusterlob_gpu"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["numeric"] = is_numeric
    facts = {
        "exchange": info["exchange"],
        "days": f"{info['start']} to {info['end']} ({info['days']})",
        "backend": info["backend"],
        "workers": info["workers"],
        "seconds": f"{info['seconds']:.1f}",
        "config": info["config_hash"],
    }
    return environment.get_template(template).render(info=info, facts=facts, sections=sections).encode()
