"""The page and its words, on a small made-up run whose tables come from the real statistics."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
import struct
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from rich.console import Console

from clusterlob_gpu import pictures
from clusterlob_gpu.config import make_config, parse_duration, read_preset
from clusterlob_gpu.errors import InputError
from clusterlob_gpu.evaluation import Target, cluster_ic, markout_table
from clusterlob_gpu.findings import findings, needed_buckets
from clusterlob_gpu.page import png
from clusterlob_gpu.report import console_tables, read_run, render_run
from clusterlob_gpu.schema import FEATURES, US_PER_DAY, Z_FEATURES

WIDTH = 300_000_000
START = 1_714_521_600_000_000  # 2024-05-01
CENTRES = {
    0: [0.02, 0.0, -0.12, 0.01, 1.66, 0.41],
    1: [-0.11, 1.35, -1.25, 0.0, -0.6, -0.2],
    2: [0.08, -0.75, 0.81, -0.02, -0.89, -0.31],
}
LABELS = {-1: "all clusters", 0: "passive", 1: "opportunistic", 2: "directional"}
OTHER = {-1: "all clusters", 0: "passive", 1: "directional", 2: "opportunistic"}


def centroid_table(symbol: str, windows: int, rng: np.random.Generator) -> pd.DataFrame:
    rows = []
    for window in range(windows):
        for cluster, centre in CENTRES.items():
            z = np.array(centre) + 0.03 * window * rng.normal(size=6)
            share = (0.434, 0.19, 0.376)[cluster]
            row: dict[str, Any] = {"symbol": symbol, "window_id": window, "cluster": cluster}
            row |= {"label": LABELS[cluster], "label_other": OTHER[cluster]}
            row |= {"count": round(share * 2_764_972), "share": share, "score": z[1] - z[2]}
            row |= dict(zip(Z_FEATURES, z, strict=True))
            row |= dict(zip(FEATURES, [0.031, 2.9, 2.8, 1.02, 1.9e6, 6.1e5], strict=True))
            row |= {
                "interpretation": "after a long rest of the mid <b>",
                "matched": cluster if window else None,
            }
            row |= {"drift": abs(rng.normal(0.05, 0.01)) if window else None}
            row |= {"agrees": (window, cluster) != (2, 1) if window else None}
            rows.append(row)
    return pd.DataFrame(rows).astype({"matched": "Int64", "agrees": "boolean", "drift": "float64"})


def bucket_table(
    symbol: str, days: int, windows: int, effect: float, rng: np.random.Generator
) -> pd.DataFrame:
    """The last windows label a day each."""
    n = days * 288
    flow = {c: rng.normal(size=n) * scale for c, scale in ((0, 90.0), (1, 60.0), (2, 140.0))}
    flow[-1] = flow[0] + flow[1] + flow[2]
    returns = 6e-4 * rng.normal(size=n + 300) + 0.0
    returns[:n] += 6e-4 * 0.5 * flow[-1] / 178
    returns[1 : n + 1] += 6e-4 * effect * flow[1] / 60
    path = np.concatenate([[0.0], np.cumsum(returns)])
    at = np.arange(n)
    window = np.maximum(at // 288 + windows - days, 0)
    midnight = (at // 288 + 1) * 288
    target = {
        "conr": path[at + 1] - path[at],
        "frnb": path[at + 2] - path[at + 1],
        "freb": path[midnight] - path[at + 1],
    }
    target |= {
        f"r_{name}": path[at + 1 + h] - path[at + 1] for name, h in (("5m", 1), ("15m", 3), ("1h", 12))
    }
    size = {c: rng.poisson(share * 1400, size=n) for c, share in ((0, 0.434), (1, 0.19), (2, 0.376))}
    size[-1] = size[0] + size[1] + size[2]
    parts = [
        pd.DataFrame(
            {"symbol": symbol, "window_id": window, "bucket_ts": START + at * WIDTH, "cluster": c}
        ).assign(n_trades=size[c], ofi_size=f, ofi_count=f.round(), ofi_notional=6e4 * f, **target)
        for c, f in flow.items()
    ]
    return pd.concat(parts, ignore_index=True)


def markout_sums(buckets: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    parts = []
    for horizon, scale in ((1, 0.06), (5, 0.1), (30, 0.16), (300, 0.2)):
        means = buckets["cluster"].map({-1: 0.2, 0: 0.1, 1: 0.9, 2: -0.4}) * scale
        count = buckets["n_trades"]
        total = means * count + rng.normal(size=len(buckets)) * count * horizon**0.5 * 0.1
        parts.append(
            pd.DataFrame(
                {"bucket_ts": buckets["bucket_ts"], "cluster": buckets["cluster"], "n": count}
            ).assign(horizon_us=horizon * 1_000_000, sum_bps=total)
        )
    return pd.concat(parts)


def make_run(
    out: Path, symbols: tuple[str, ...] = ("BTCUSDT",), days: int = 7, windows: int = 1, effect: float = 0.0
) -> Path:
    """A finished run directory of `run cluster`, with the published block of the research log."""
    rng = np.random.default_rng(3)
    sample = "in_sample" if windows == 1 else "out_of_sample"
    targets = [
        Target("conr", "conr", WIDTH, predictive=False),
        Target("frnb", "frnb", WIDTH),
        Target("freb", "freb", US_PER_DAY),
        *(Target(f"r_{h}", f"r_{h}", parse_duration(h)) for h in ("5m", "15m", "1h")),
    ]
    buckets = pd.concat([bucket_table(symbol, days, windows, effect, rng) for symbol in symbols])
    ic = cluster_ic(buckets, targets, width_us=WIDTH, draws=100).assign(sample=sample)
    marks = pd.concat(
        [
            markout_table(markout_sums(mine, rng), width_us=WIDTH).assign(symbol=symbol)
            for symbol, mine in buckets.groupby("symbol")
        ]
    )
    tables = {
        "centroids": pd.concat([centroid_table(symbol, windows, rng) for symbol in symbols]),
        "buckets": buckets,
        "ic": ic.assign(label=ic["cluster"].map(LABELS)),
        "markouts": marks.assign(label=marks["cluster"].map(LABELS), label_other=marks["cluster"].map(OTHER)),
    }
    (out / "results").mkdir(parents=True)
    for name, table in tables.items():
        table.astype({"cluster": "int8"}).to_parquet(out / "results" / f"{name}.parquet", index=False)
    dropped = {"side_unknown": 0, "no_book": 12, "stale_book": 345, "warmup": 99, "null_change_time": 0}
    rows = {"trades": 2_765_428, "kept": 2_764_972, "dropped": dropped, "book_rows": 864_000}
    rows["labelled"] = 2_764_972 if windows == 1 else 1_500_000
    rows["book_skipped"] = {"empty_side": 0, "non_positive": 3, "crossed": 41}
    info = {
        "experiment": "cluster",
        "status": "done",
        "exchange": "binance-futures",
        "symbols": list(symbols),
        "start": "2024-05-01",
        "end": "2024-05-07",
        "days": days,
        "config": make_config({}).resolved(),
        "config_hash": "0123456789abcdef",
        "versions": {"clusterlob_gpu": "0.1.0", "numpy": "2.4"},
        "backend": "cpu",
        "workers": 2,
        "rows": dict.fromkeys(symbols, rows),
        "timings": {"features": 1.2, "fit": 0.4},
        "seconds": 3.21,
        "sample": sample,
        "published": read_preset("research_log_7d").published,
        "notes": ["A note with <angle> brackets."],
    }
    (out / "run.json").write_text(json.dumps(info))
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("walk"), ("BTCUSDT", "ETHUSDT"), days=3, windows=3, effect=0.5)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.sources += [given["src"] or ""] if "src" in given else []
        self.links += [tag] if tag in ("link", "script", "iframe") else []

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def one_view(out: Path) -> pictures.View:
    return read_run(out)[1][0]


def said(out: Path) -> str:
    return "\n".join(findings(one_view(out)))


# ---- page and pictures


def test_render_run__writes_pictures_and_one_self_contained_page(run: Path) -> None:
    written = render_run(run)
    names = ["centroids", "shares", "ic", "ic_horizons", "markouts", "sides", "flow", "shares_over_time"]
    assert written == [*(run / "plots" / f"{name}_BTCUSDT.png" for name in names), run / "report.html"]
    for path in written[:-1]:
        head = path.read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">II", head[16:])[0] == round(pictures.WIDTH_IN * pictures.DPI)
    text = written[-1].read_text()
    page = Page(text)
    assert page.links == []
    assert [base64.b64decode(s.removeprefix("data:image/png;base64,")) for s in page.sources] == [
        path.read_bytes() for path in written[:-1]
    ]
    assert re.search(r"(src|href)=\"(?!data:)", text) is None
    assert "url(" not in text
    assert "A note with <angle> brackets." in page.text  # escaped in the source
    assert "<angle>" not in text
    assert sorted(path.name for path in run.iterdir()) == ["plots", "report.html", "results", "run.json"]
    first = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in render_run(run)] == first


def test_render_run__walk_forward_of_two_symbols_adds_drift(walk: Path) -> None:
    names = [path.name for path in render_run(walk)]
    assert len(names) == 2 * 9 + 1
    assert {"drift_BTCUSDT.png", "drift_ETHUSDT.png"} <= set(names)
    text = (walk / "report.html").read_text()
    assert "OUT OF SAMPLE" in text
    assert ">IN SAMPLE<" not in text


def texts(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.texts]


def test_pictures__carry_the_stamp_only_in_sample(run: Path, walk: Path) -> None:
    for out, expected in ((run, True), (walk, False)):
        view = one_view(out)
        made = pictures.pictures(view)
        assert len(made) == (8 if expected else 9)
        assert [("IN SAMPLE" in texts(make(view))) for _, make in made] == [expected] * len(made)


def shown_texts(figure: Figure) -> Iterator[tuple[str, Bbox]]:
    """Texts of a drawn figure and their places, without the labels of ticks beyond the limits."""
    beyond = {
        label
        for axes in figure.findobj(Axes)
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks()
        for label in (tick.label1, tick.label2)
        if not axis.get_view_interval()[0] <= tick.get_loc() <= axis.get_view_interval()[1]
    }
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and text not in beyond:
            yield text.get_text(), text.get_window_extent()


@pytest.mark.parametrize("windows", [1, 4])
def test_pictures__texts_stand_inside_and_apart(windows: int, tmp_path: Path) -> None:
    view = one_view(make_run(tmp_path / "run", days=4, windows=windows))
    for name, make in pictures.pictures(view):
        figure = make(view)
        FigureCanvasAgg(figure).draw()
        texts = list(shown_texts(figure))
        for text, box in texts:
            assert box.x0 > 0, (name, text)
            assert box.y0 > 0, (name, text)
            assert box.x1 < figure.bbox.x1, (name, text)
            assert box.y1 < figure.bbox.y1, (name, text)
        for (one, a), (other, b) in itertools.combinations(texts, 2):
            apart = min(a.x1, b.x1) - max(a.x0, b.x0) < 1 or min(a.y1, b.y1) - max(a.y0, b.y0) < 1
            assert apart, (name, one, other)


def test_ic_picture__draws_ic_interval_and_detectable_band(run: Path) -> None:
    view = one_view(run)
    axes = pictures.ic_bars(view).axes[0]
    rows = view.ic[(view.ic["target"] == "frnb") & (view.ic["signal"] == "ofi_size")].set_index("cluster")
    bars = [bar.get_height() for bar in axes.patches]
    assert bars == pytest.approx(rows["ic"].reindex([0, 1, 2, -1]).tolist())
    spans = [c.get_paths()[0].vertices[:, 1] for c in axes.collections]
    bands, whiskers = spans[::2], spans[1::2]
    assert [v.max() for v in bands] == pytest.approx(rows["mde"].reindex([0, 1, 2, -1]).tolist())
    assert [(v.min(), v.max()) for v in whiskers] == [
        pytest.approx(pair) for pair in rows[["ci_low", "ci_high"]].reindex([0, 1, 2, -1]).to_numpy().tolist()
    ]


def test_horizons__show_the_next_bucket_once(run: Path) -> None:
    axes = pictures.ic_horizons(one_view(run)).axes[0]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["frnb\n5m", "r_15m\n15m", "r_1h\n1h", "freb\nto midnight"]


def test_ic_picture__thin_bars_are_hollow_and_no_band_passes_one(walk: Path) -> None:
    view = one_view(walk)
    view.ic.loc[view.ic["target"] == "freb", "mde"] = 3.0
    for target, hollow in (("frnb", False), ("freb", True)):
        axes = pictures.ic_bars(view, target).axes[0]
        assert [bar.get_facecolor()[3] == 0 for bar in axes.patches] == [hollow] * 4
        bands = [collection.get_paths()[0].vertices[:, 1].max() for collection in axes.collections[::2]]
        assert (max(bands) == 1.0) == hollow


def test_return_path__restarts_after_a_gap(run: Path) -> None:
    """Conr of 1, 2, null, 3 bps, an absent bucket, 4 bps: three stretches, each from 0."""
    view = one_view(run)
    at = np.array([0, 1, 2, 3, 5])
    conr = 1e-4 * np.array([1.0, 2.0, np.nan, 3.0, 4.0])
    every = view.buckets[view.buckets["cluster"] == -1].head(5)
    every = every.assign(bucket_ts=START + at * WIDTH, conr=conr)
    figure = pictures.flow_and_price(replace(view, buckets=every))
    line = figure.axes[1].lines[0]
    assert line.get_ydata() == pytest.approx([1, 3, np.nan, 3, np.nan, 4], nan_ok=True)
    assert pd.Timestamp(line.get_xdata()[0]) == pd.Timestamp("2024-05-01 00:05")
    assert "within each of 3 stretches" in " ".join(figure.get_supxlabel().split())
    whole = " ".join(pictures.flow_and_price(view).get_supxlabel().split())
    assert whole.endswith("Return: sum of conr.")


def test_names__of_all_windows_and_of_the_last(tmp_path: Path) -> None:
    out = make_run(tmp_path / "run", days=3, windows=3)
    results = out / "results"
    tables = {name: pd.read_parquet(results / f"{name}.parquet") for name in ("centroids", "ic", "markouts")}
    table = tables["centroids"]
    table.loc[(table["cluster"] == 0) & (table["window_id"] > 0), "label"] = "other 0"
    table.loc[(table["cluster"] == 2) & (table["window_id"] == 2), "label"] = "unassigned"
    for name in ("ic", "markouts"):
        tables[name].loc[tables[name]["cluster"] == 2, "label"] = "directional in 2 of 3 windows"
        tables[name].loc[tables[name]["cluster"] == 0, "label"] = "other 0 in 2 of 3 windows"
    tables["ic"].loc[tables["ic"]["cluster"] == 0, "verdict"] = "mixed"
    for name, changed in tables.items():
        changed.to_parquet(results / f"{name}.parquet", index=False)
    view = one_view(out)
    assert [view.name(c) for c in (-1, 0, 1, 2)] == [
        "all clusters",
        "0 other in 2 of 3 windows",
        "1 opportunistic",
        "2 directional in 2 of 3 windows",
    ]
    assert [view.last_name(c) for c in (0, 2)] == ["0 other", "2 unassigned"]
    ticks = [tick.get_text() for tick in pictures.side_audit(view).axes[0].get_xticklabels()]
    assert [tick.split("\n")[0].split(" ")[0] for tick in ticks] == ["opportunistic", "directional", "other"]
    words = said(out)
    assert "One cluster in the last window reaches no role by the margin and is called unassigned." in words
    assert "No verdict on 0 other in 2 of 3 windows: the number stood for other trades" in words
    render_run(out)
    text = (out / "report.html").read_text()
    assert "<h3>Clusters of the last window (2024-05-03)</h3>" in text
    assert "<summary>Mean raw features of the last window (2024-05-03)</summary>" in text
    assert "Mixed: beyond the named roles" in text
    assert "pool the windows by the number of the cluster" in text
    titles = [str(made.title) for made in console_tables(out)]
    assert titles[0] == "BTCUSDT: clusters of the last window (2024-05-03)"


# ---- words


def test_findings__null_sample_says_what_it_could_have_found(run: Path) -> None:
    words = said(run)
    view = one_view(run)
    frnb = view.ic[(view.ic["target"] == "frnb") & (view.ic["signal"] == "ofi_size")]
    assert words.startswith("In-sample: the clusters were fitted on days on which")
    assert (
        "No cluster's IC differs from zero after correction for 60 tests; the smallest IC this sample "
        f"could detect is {frnb['mde'].min():.3f}"
    ) in words
    assert "No cluster differs from aggregate flow (ofi_size on frnb)" in words
    assert "Names follow same_side: own (sbs is the depth on the taker's own side)." in words
    assert (
        "Under consumed cluster 1 opportunistic becomes directional; cluster 2 directional becomes" in words
    )
    assert (
        "2,764,972 of 2,765,428 trades were kept (99.98%), 456 dropped: 12 no book yet, 345 stale book"
        in words
    )
    assert "Of 864,000 book rows these were no valid book and skipped: 3 non positive, 41 crossed." in words


def test_findings__planted_effect_is_named_with_its_interval(walk: Path) -> None:
    words = said(walk)
    view = one_view(walk)
    row = view.ic[
        (view.ic["target"] == "frnb") & (view.ic["signal"] == "ofi_size") & (view.ic["cluster"] == 1)
    ].iloc[0]
    assert row["verdict"] == "positive"
    assert words.startswith("Out of sample: no day was labelled by clusters that were fitted on that day.")
    assert (
        f"ofi_size of 1 opportunistic on frnb {row['ic']:+.3f} [{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]"
        in words
    )
    assert "clusters differ from aggregate flow" in words
    mine = int(view.ic["p_fdr"].notna().sum())
    assert (mine, view.tests) == (48, 96)  # 60 predictive rows a symbol, 12 of them thin
    assert "of 48 ICs differ from zero after correction for 96 tests of all symbols: " in words
    assert (
        "A model labelled 1,500,000 of these; the others lie on days that no window tests. Of 864,000"
        in words
    )
    assert "Under consumed in the last window cluster 1 opportunistic becomes directional" in words
    assert "Over 3 windows the naming rule and the tracked match disagree 1 of 6 times" in words
    assert "12 of 60 rows (freb) are too thin to judge" in words  # freb over three days


def test_needed_buckets__matches_the_power_formula() -> None:
    row = pd.Series({"n": 2016, "diff_low": -0.02, "diff_high": 0.06})
    se = 0.08 / (2 * 1.959964)
    assert needed_buckets(row, 0.026) == pytest.approx(
        2016 * ((1.959964 + 0.841621) * se / 0.026) ** 2, rel=1e-6
    )
    assert np.isnan(needed_buckets(row, 0.0))


def test_findings__say_how_much_data_the_published_lead_needs(run: Path) -> None:
    view = one_view(run)
    row = view.ic[
        (view.ic["target"] == "frnb") & (view.ic["signal"] == "ofi_size") & (view.ic["cluster"] == 1)
    ].iloc[0]
    buckets = needed_buckets(row, 0.0606 - 0.0346)
    expected = (
        "published difference of +0.0260 between 1 opportunistic and aggregate flow with 80 % power, about "
    )
    assert f"{expected}{buckets:,.0f} buckets ({int(np.ceil(buckets / 288)):,} days) are needed" in said(run)


# ---- tables


def test_console_tables__hold_the_numbers(run: Path) -> None:
    tables = console_tables(run)
    assert [str(table.title) for table in tables] == [
        "BTCUSDT: clusters",
        "BTCUSDT: IC of ofi_size on frnb, in sample",
        "BTCUSDT: mark-outs",
        "BTCUSDT: published and measured",
    ]
    assert [table.row_count for table in tables] == [3, 4, 16, 1 + 3 * 6 + 4]
    console = Console(width=150, record=True, file=io.StringIO())
    for table in tables:
        console.print(table)
    text = console.export_text()
    lines = text.splitlines()
    assert sum(line.startswith("│") for line in lines) == sum(table.row_count for table in tables)
    assert "…" not in text
    assert "opportunistic" in text
    assert "43.4%" in text
    assert "27,649,725" in text
    assert "+0.0606" in text


def test_empty_cluster_and_null_mids__still_make_a_page(tmp_path: Path) -> None:
    out = make_run(tmp_path / "run", days=1)
    results = out / "results"
    buckets = pd.read_parquet(results / "buckets.parquet")
    empty = buckets["cluster"] == 2
    buckets.loc[empty, ["ofi_size", "ofi_count", "ofi_notional", "n_trades"]] = 0
    buckets["frnb"] = np.nan
    targets = [Target("frnb", "frnb", WIDTH), Target("r_15m", "r_15m", 3 * WIDTH)]
    ic = cluster_ic(buckets, targets, width_us=WIDTH, draws=20).assign(sample="in_sample", label="")
    marks = pd.read_parquet(results / "markouts.parquet")
    centroids = pd.read_parquet(results / "centroids.parquet")
    centroids.loc[centroids["cluster"] == 2, ["count", "share"]] = 0
    for name, table in (
        ("buckets", buckets),
        ("ic", ic),
        ("markouts", marks[marks["cluster"] != 2]),
        ("centroids", centroids),
    ):
        table.to_parquet(results / f"{name}.parquet", index=False)
    assert render_run(out)[-1] == out / "report.html"
    assert "15 of 24 rows (frnb, r_15m) are too thin to judge" in said(
        out
    )  # 12 without return, 3 without flow
    assert "published difference" not in said(out)
    columns = {str(column.header): set(column.cells) for column in console_tables(out)[1].columns}
    assert columns["verdict"] == {"thin"}


def test_published__is_optional(tmp_path: Path) -> None:
    out = make_run(tmp_path / "run", days=1)
    info = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(info | {"published": None}))
    render_run(out)
    assert len(console_tables(out)) == 3
    assert "published" not in said(out)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda out: (out / "run.json").unlink(), "run.json: cannot be read"),
        (lambda out: (out / "run.json").write_text("{"), "not valid JSON"),
        (lambda out: (out / "run.json").write_text('{"experiment": "other"}'), "experiment = 'other'"),
        (lambda out: (out / "results" / "ic.parquet").unlink(), "ic.parquet: is missing"),
    ],
)
def test_errors__name_the_file(tmp_path: Path, spoil: Any, message: str) -> None:
    out = make_run(tmp_path / "run", days=1)
    spoil(out)
    with pytest.raises(InputError, match=re.escape(message)):
        render_run(out)


# ---- preset


def test_preset__holds_the_research_log() -> None:
    preset = read_preset("research_log_7d")
    config = make_config(preset.config)
    assert (str(preset.start), str(preset.end), preset.symbols) == ("2024-05-01", "2024-05-07", ("BTCUSDT",))
    assert (config.k, config.window, config.depth, config.same_side, config.bucket) == (
        3,
        100,
        5,
        "own",
        WIDTH,
    )
    published = preset.published
    assert published is not None
    assert published["trades"] == 27_649_725
    assert {e["cluster"]: e["ic"] for e in published["ic"]} == {1: 0.0606, -1: 0.0346, 0: 0.0205, 2: -0.0065}
    assert sum(entry["share"] for entry in published["clusters"]) == pytest.approx(1.0)
    assert sum(entry["count"] for entry in published["clusters"]) == pytest.approx(27_649_725, abs=30_000)


@pytest.mark.parametrize("there", [False, True])
def test_png__panels_without_data_have_a_scale(there: bool) -> None:
    """Nothing but rounding, as Matplotlib makes of some empty panels; one of them may have data."""
    figure = pictures.frame("little", "", 2.0)
    panels = figure.subplots(1, 2, sharey=True)
    for axes in panels:
        axes.plot([0, 1], [0.0, 1e-17])
        pictures.plain(axes)
    if there:
        panels[1].plot([0, 1], [0.2, 3.0])
    png(figure)
    for axes in panels:
        low, high = axes.get_ylim()
        assert -0.5 < low < 0 < 3 < high < 3.5 if there else (low, high) == (-1, 1)
