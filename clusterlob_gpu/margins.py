"""Room around the panels of a picture, from the texts that stand there.

Matplotlib's own layouts draw every picture once to learn its margins, which takes as long as the picture.
Here the longest text of each side is measured instead.  Lengths are points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cbook import is_math_text
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import LayoutEngine
from matplotlib.textpath import text_to_path

EDGE = 6.0
"""Least distance between a text and the picture's edge, or another panel's texts."""
_BAR = 22.0
"""Width of a colour bar, and its distance to its panel."""
_TICK = 7.0
"""Length of a tick and its distance to its label."""
_LINE = 1.2
"""Height of a line of text, in font sizes."""
_LEGEND_MARK = 4.2
"""What stands around a name in a legend: mark and paddings, in font sizes."""


class Margins(LayoutEngine):
    """Places the panels of a figure's grid, its heading and its caption."""

    _adjust_compatible = True
    _colorbar_gridspec = True

    def execute(self, fig: Figure) -> None:
        """Set the figure's margins and the distances between its panels."""
        panels = [(axes, spec) for axes in fig.axes if (spec := axes.get_subplotspec()) is not None]
        if not panels:
            return
        width, height = (72 * inches for inches in fig.get_size_inches())
        rows, columns = panels[0][1].get_gridspec().get_geometry()
        across = [(axes, spec.colspan.start) for axes, spec in panels]
        down = [(axes, spec.rowspan.start) for axes, spec in panels]
        head = EDGE + _block(fig.get_suptitle(), 12.0) + EDGE
        foot = EDGE + _block(fig.get_supxlabel(), 8.0) + EDGE
        left, right, wide = _spaces(across, columns, _left, _right)
        top, bottom, high = _spaces(down, rows, _above, _below)
        inner_width = (width - left - right - (columns - 1) * wide) / columns
        inner_height = (height - head - foot - top - bottom - (rows - 1) * high) / rows
        fig.subplots_adjust(
            left=left / width,
            right=1 - right / width,
            top=1 - (head + top) / height,
            bottom=(foot + bottom) / height,
            wspace=wide / inner_width,
            hspace=high / inner_height,
        )


def _spaces(
    panels: Iterable[tuple[Axes, int]],
    count: int,
    before: Callable[[Axes], float],
    after: Callable[[Axes], float],
) -> tuple[float, float, float]:
    """Room before the first of `count` columns (or rows), after the last, and the most between two."""
    first, last = [0.0] * count, [0.0] * count
    for axes, at in panels:
        first[at] = max(first[at], before(axes))
        last[at] = max(last[at], after(axes))
    between = (after_one + next_one for after_one, next_one in zip(last, first[1:], strict=False))
    return first[0], last[-1], max(between, default=0.0)


def _left(axes: Axes) -> float:
    return EDGE + _ticks(axes.yaxis)[0] + _label(axes.yaxis)


def _right(axes: Axes) -> float:
    """A legend or a colour bar stands on the right."""
    legend = axes.get_legend()
    beside = [_ticks(bar.yaxis)[0] + _BAR for bar in axes.child_axes]
    if legend is not None:
        texts = legend.get_texts()
        size = float(texts[0].get_fontsize())
        names = max(_extent(text.get_text(), size)[0] for text in texts)
        beside.append(legend._ncols * (names + _LEGEND_MARK * size))  # type: ignore[attr-defined]
    return EDGE + max(beside, default=0.0)


def _above(axes: Axes) -> float:
    title = axes.get_title(loc="left")
    return EDGE + (_block(title, 9.5) if title else 0.0)


def _below(axes: Axes) -> float:
    return EDGE + _ticks(axes.xaxis)[1] + _label(axes.xaxis)


def _label(axis: Axis) -> float:
    text = axis.get_label_text()
    return _block(text, float(axis.label.get_fontsize())) + axis.labelpad if text else 0.0


def _ticks(axis: Axis) -> tuple[float, float]:
    """Width and height of the ticks and their labels."""
    tick = axis.get_major_ticks(1)[0]
    label = next((label for label in (tick.label1, tick.label2) if label.get_visible()), None)
    texts = axis.get_major_formatter().format_ticks(list(axis.get_majorticklocs()))
    if label is None or not any(texts):
        return _TICK / 2, _TICK / 2
    size = float(label.get_fontsize())
    longest = max(texts, key=lambda text: max(map(len, text.split("\n"))))
    width, _ = _extent(longest, size)
    height = max(_block(text, size) for text in texts)
    if label.get_rotation() == 90:
        width, height = height, width
    return width + _TICK, height + _TICK


def _block(text: str, size: float) -> float:
    """Height of a text."""
    return _LINE * size * (text.count("\n") + 1)


@cache
def _extent(text: str, size: float) -> tuple[float, float]:
    """Width of the longest line of a text, and its height."""
    font = FontProperties(size=size)
    lines = [line for line in text.split("\n") if line]
    widths = [text_to_path.get_text_width_height_descent(line, font, is_math_text(line))[0] for line in lines]
    return max(widths, default=0.0), _block(text, size)
