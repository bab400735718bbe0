"""What every report is made of: numbers as text, tables for the terminal, one self-contained page."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from rich.table import Table

from clusterlob_gpu import beside, cores
from clusterlob_gpu.beside import Each
from clusterlob_gpu.errors import InputError
from clusterlob_gpu.store import read_frame

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOTHING = "-"
_NO_RANGE = 1e-12
"""Below what any picture shows; Matplotlib would write 1e-17 over the title."""

_COMPRESS_LEVEL = 1
"""Of pictures: higher levels take twice the time for a tenth of the size."""


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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    for axes in figure.axes:
        low, high = axes.get_ylim()
        if abs(high - low) < _NO_RANGE:  # nothing but the line at zero
            axes.set_ylim(-1, 1)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # `savefig` would draw it twice, to find its margins
    buffer = io.BytesIO()
    pixels = Image.fromarray(np.asarray(canvas.buffer_rgba())[:, :, :3])
    pixels.save(buffer, "png", compress_level=_COMPRESS_LEVEL, dpi=(figure.dpi, figure.dpi))
    return buffer.getvalue()


def write(path: Path, content: bytes) -> None:
    """Write a file that appears only when complete."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


@dataclass(frozen=True)
class Picture:
    """A picture of a run."""

    symbol: str
    name: str
    caption: str

    def file(self, out: Path) -> Path:
        """Where it is written: plots/<name>_<symbol>.png."""
        return out / "plots" / f"{self.name}_{re.sub(r'[^A-Za-z0-9._-]', '_', self.symbol)}.png"


@dataclass(frozen=True)
class Drawing(Picture):
    """A picture to be drawn."""

    make: Callable[[], Figure]

    def draw(self, out: Path) -> None:
        """Write its file."""
        write(self.file(out), png(self.make()))


Images = Callable[[], list[tuple[str, str, str]]]
"""Gives name, caption and base64 of a section's pictures, once they are drawn."""


Drawings = Callable[[Path], Sequence[Drawing]]
"""Gives the pictures of a run that are to be drawn."""


def draw(out: Path, drawings: Drawings, each: Each = map) -> list[Picture]:
    """Draw every picture of a run."""
    found = drawings(out)
    list(each(lambda drawing: drawing.draw(out), found))
    return [Picture(drawing.symbol, drawing.name, drawing.caption) for drawing in found]


class Drawn:
    """The pictures of a run, drawn beside this process where somebody is, while the page is written."""

    def __init__(self, out: Path, drawings: Drawings) -> None:
        self.out = out
        self._drawn = beside.ask("pictures", draw, out, drawings, hands=cores.available())

    @cached_property
    def pictures(self) -> list[Picture]:
        """The pictures, once they are all on disk."""
        return self._drawn()

    @property
    def files(self) -> list[Path]:
        """Their files, in order."""
        return [picture.file(self.out) for picture in self.pictures]

    def images(self, symbol: str) -> list[tuple[str, str, str]]:
        """Those of a symbol, as `Images` gives them."""
        return [
            (picture.name, picture.caption, base64.b64encode(picture.file(self.out).read_bytes()).decode())
            for picture in self.pictures
            if picture.symbol == symbol
        ]


def page(template: str, info: dict[str, Any], sections: list[Any]) -> bytes:
    """The page of a run, from a template of the package."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

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
