"""The console script on tiny lakes: exit codes, one-line errors, and nothing written on bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lakes
import pandas as pd
import pyarrow.parquet as pq
import pytest
from lakes import DAYS, EXCHANGE, SYMBOL

from clusterlob_gpu import __version__, cli

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the console script in this process: exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["clusterlob", *map(str, arguments)])
        monkeypatch.setattr("signal.signal", lambda *_: None)
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def clusterlob(script: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The same without pictures, which take most of the time of a small run."""
    monkeypatch.setattr("clusterlob_gpu.report.render_run", lambda _: [])
    return script


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two days around midnights, and a day without trades."""
    market = lakes.over_midnight(days=3, missing_trades=[2])
    return market.write(tmp_path_factory.mktemp("cli") / "lake")


def asked(
    lake: Path, out: Path, *, symbol: str = SYMBOL, start: str = DAYS[0], end: str = DAYS[1]
) -> list[object]:
    return [
        *("--lake", lake, "--exchange", EXCHANGE, "--symbol", symbol),
        *("--start", start, "--end", end, "--out", out),
    ]


SMALL = ["--set", "window=20", "--set", "keep_trades=true"]


# ---- bad input --------------------------------------------------------------------------------------


def assert_refused(result: tuple[int, str, str], message: str, folder: Path) -> None:
    """Exit code 2, nothing on standard output, the reason on one line, nothing written."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert err.rstrip("\n").splitlines()[-1].lower().startswith("error: ")
    assert list(folder.iterdir()) == []


BAD = {
    "unknown symbol": (["--symbol", "XRPUSDT"], "no symbol XRPUSDT of testex; the lake has testex AAAUSDT"),
    "unknown exchange": (["--exchange", "moon"], "no symbol AAAUSDT of moon"),
    "missing day": (["--end", DAYS[2]], f"no trades for testex AAAUSDT on {DAYS[2]}"),
    "absent lake": (["--lake", "nowhere"], "nowhere: no such lake; make one with `clusterlob ingest`"),
    "end before start": (["--end", "2024-02-27"], "--end 2024-02-27 lies before --start 2024-02-28"),
    "not a day": (["--end", "tomorrow"], "'tomorrow' does not match the format"),
    "symbol twice": (["--symbol", SYMBOL, "--symbol", SYMBOL], "--symbol AAAUSDT: given twice"),
    "unknown key": (["--set", "colour=red"], "colour: no such key; known keys are book, depth"),
    "bad value": (["--set", "k=1"], "k = 1: Input should be greater than or equal to 2"),
    "bad yaml": (["--set", "horizons=[5m"], "--set horizons=[5m: '[5m' is not a YAML value"),
    "no value": (["--set", "k"], "--set k: must be key=value"),
    "absent config": (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read: No such file"),
    "gpu": (["--backend", "gpu"], "--backend gpu: "),
    "unknown backend": (["--backend", "tpu"], "'tpu' is not one of"),
    "gpu engine": (["--set", "engine=cuml"], "engine = 'cuml': needs the gpu backend"),
    "unknown workers": (["--workers", "nowhere"], "--workers nowhere: no such place"),
    "unknown preset": (["--preset", "nowhere"], "--preset nowhere: no such preset"),
    "no window": (["--set", "train_days=7"], "2 days hold no walk-forward window of 7 training"),
    "unknown option": (["--depth", "5"], "No such option"),
}


@pytest.mark.parametrize("name", BAD)
def test_run_cluster__bad_input(clusterlob: Run, lake: Path, tmp_path: Path, name: str) -> None:
    arguments, message = BAD[name]
    if arguments[0] == "--symbol":
        base = [*asked(lake, tmp_path / "out")]
        base[4:6] = []
    else:
        base = asked(lake, tmp_path / "out")
    assert_refused(clusterlob("run", "cluster", *base, *arguments), message, tmp_path)


@pytest.mark.parametrize("option", ["--lake", "--exchange", "--symbol", "--start", "--end", "--out"])
def test_run_cluster__missing_option_is_named(
    clusterlob: Run, lake: Path, tmp_path: Path, option: str
) -> None:
    arguments = asked(lake, tmp_path / "out")
    at = arguments.index(option)
    assert_refused(clusterlob("run", "cluster", *arguments[:at], *arguments[at + 2 :]), option, tmp_path)


def test_run_cluster__folder_that_is_no_run_stays(clusterlob: Run, lake: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    code, out, err = clusterlob("run", "cluster", *asked(lake, tmp_path))
    assert (code, out) == (2, "")
    assert "exists and is not a run; choose an empty or new directory" in err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_run_cluster__broken_file_of_the_lake(clusterlob: Run, tmp_path: Path) -> None:
    lake = lakes.plain().write(tmp_path / "lake")
    (path,) = (lake / "trades").rglob("*.parquet")
    path.write_bytes(path.read_bytes()[:100])
    out = tmp_path / "runs"
    out.mkdir()
    result = clusterlob("run", "cluster", *asked(lake, out / "run", end=DAYS[0]))
    assert_refused(result, f"{path}: not a readable Parquet file", out)


def test_run_cluster__fewer_trades_than_a_window(clusterlob: Run, lake: Path, tmp_path: Path) -> None:
    """Found out on the way: exit code 2, no run, a line in the ledger that says so."""
    code, out, err = clusterlob("run", "cluster", *asked(lake, tmp_path / "out"), "--set", "window=90000")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "store"]
    (line,) = (tmp_path / "logs" / "runs.jsonl").read_text().splitlines()
    assert json.loads(line)["status"] == "failed"


def test_job_that_fails__exit_code_1(
    clusterlob: Run, lake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk while computing is no fault of the input."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr("clusterlob_gpu.days.save_columns", full)
    code, out, err = clusterlob("run", "cluster", *asked(lake, tmp_path / "out"), *SMALL)
    assert (code, out, err) == (1, "", "error: somewhere: No space left on device\n")
    assert not (tmp_path / "out").exists()


# ---- runs -------------------------------------------------------------------------------------------

STAGES = ("book", "tail", "features", "sample", "fit", "label", "mids", "tables")


def result_files(out: Path) -> list[str]:
    return sorted(
        str(path.relative_to(out)) for path in (out / "results").rglob("*.parquet") if path.is_file()
    )


def assert_same_results(one: Path, other: Path) -> None:
    assert result_files(one) == result_files(other)
    for name in result_files(one):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert (one / "model.json").read_text() == (other / "model.json").read_text()


def test_run_cluster__leaves_what_the_specification_lists(script: Run, lake: Path, tmp_path: Path) -> None:
    code, out, err = script("run", "cluster", *asked(lake, tmp_path / "runs" / "one"), *SMALL)
    assert (code, err) == (0, "")
    assert f"report: {tmp_path / 'runs' / 'one' / 'report.html'}" in out
    one = tmp_path / "runs" / "one"
    assert result_files(one) == [
        "results/buckets.parquet",
        "results/centroids.parquet",
        "results/ic.parquet",
        "results/markouts.parquet",
        *(f"results/trade_features.parquet/{SYMBOL}-{day}.parquet" for day in DAYS[:2]),
    ]
    assert {path.name for path in one.iterdir()} == {
        "inputs.json",
        "model.json",
        "plots",
        "report.html",
        "results",
        "run.json",
    }
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"logs", "one", "store"}
    record = json.loads((one / "run.json").read_text())
    assert record["status"] == "done"
    assert record["config"]["window"] == 20
    assert record["rows"][SYMBOL]["trades"] == 1_200
    assert {stage: held["there"] for stage, held in record["artefacts"].items()} == dict.fromkeys(STAGES, 0)
    buckets = pd.read_parquet(one / "results" / "buckets.parquet")
    assert len(buckets) == 2 * 288 * 4
    (line,) = (tmp_path / "runs" / "logs" / "runs.jsonl").read_text().splitlines()
    assert json.loads(line)["status"] == "done"

    code, again, err = script("info", one)
    assert (code, err) == (0, "")
    assert again == out
    for page in (one / "report.html", *(one / "plots").iterdir()):
        page.unlink()
    assert script("report", one)[0] == 0
    assert (one / "report.html").stat().st_size > 10_000


def test_run_cluster__second_time_reuses_and_agrees(clusterlob: Run, lake: Path, tmp_path: Path) -> None:
    outs = [tmp_path / name for name in ("one", "two")]
    for out in outs:
        assert clusterlob("run", "cluster", *asked(lake, out), *SMALL)[0] == 0
    assert_same_results(*outs)
    records = [json.loads((out / "run.json").read_text()) for out in outs]
    assert records[0]["rows"] == records[1]["rows"]
    first, second = (record["artefacts"] for record in records)
    assert first["features"] == {
        "there": 0,
        "made": 2,
        "bytes": first["features"]["bytes"],
        "why": {"new": 2},
    }
    assert {stage: held["made"] for stage, held in second.items()} == {
        stage: 0 for stage in STAGES if stage != "sample"
    }
    assert all(second[stage]["there"] == first[stage]["made"] for stage in second)
    assert len((tmp_path / "logs" / "runs.jsonl").read_text().splitlines()) == 2


def test_run_cluster__config_file_and_settings(clusterlob: Run, lake: Path, tmp_path: Path) -> None:
    """Options of the command line win over the file."""
    file = tmp_path / "my.yaml"
    file.write_text("window: 20\nk: 2\nbook: quotes\nhorizons: [10m]\n")
    out = tmp_path / "out"
    arguments = [*asked(lake, out), "--config", file, "--set", "k=4", "--store", tmp_path / "elsewhere"]
    assert clusterlob("run", "cluster", *arguments)[0] == 0
    config = json.loads((out / "run.json").read_text())["config"]
    assert (config["window"], config["k"], config["book"], config["horizons"]) == (20, 4, "quotes", ["10m"])
    assert pd.read_parquet(out / "results" / "centroids.parquet")["cluster"].tolist() == [0, 1, 2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "logs", "my.yaml", "out"]


def test_run_cluster__skips_bad_days_when_told(clusterlob: Run, lake: Path, tmp_path: Path) -> None:
    arguments = asked(lake, tmp_path / "out", end=DAYS[2])
    assert clusterlob("run", "cluster", *arguments, *SMALL, "--set", "on_bad_day=skip")[0] == 0
    buckets = pd.read_parquet(tmp_path / "out" / "results" / "buckets.parquet")
    late = buckets["bucket_ts"] >= lakes.at(2)
    assert late.sum() == 288 * 4
    assert buckets.loc[late, "ofi_size"].isna().all()
    assert buckets.loc[~late, "ofi_size"].notna().all()


# ---- label ------------------------------------------------------------------------------------------


def test_label__gives_the_buckets_of_the_run(clusterlob: Run, lake: Path, tmp_path: Path) -> None:
    fitted, labelled, one_day = (tmp_path / name for name in ("fitted", "labelled", "one_day"))
    winsorize = ["--set", "winsorize=[0.01, 0.99]"]
    assert clusterlob("run", "cluster", *asked(lake, fitted), *SMALL, *winsorize)[0] == 0
    given = ["--model", fitted / "model.json", "--lake", lake, "--set", "keep_trades=true"]
    days = ["--start", DAYS[0], "--end", DAYS[1]]
    assert clusterlob("label", *given, *days, "--out", labelled)[0] == 0
    for name in result_files(fitted):
        if "ic.parquet" not in name:
            assert pq.read_table(labelled / name).equals(pq.read_table(fitted / name)), name
    alone = ["--start", DAYS[1], "--end", DAYS[1], "--out", one_day]
    assert clusterlob("label", *given, *alone, "--store", tmp_path / "new")[0] == 0
    name = f"results/trade_features.parquet/{SYMBOL}-{DAYS[1]}.parquet"
    assert (one_day / name).read_bytes() == (fitted / name).read_bytes()


def test_label__refuses_what_does_not_fit(clusterlob: Run, lake: Path, tmp_path: Path) -> None:
    fitted, runs = tmp_path / "fitted", tmp_path / "runs"
    runs.mkdir()
    assert clusterlob("run", "cluster", *asked(lake, fitted), *SMALL)[0] == 0
    days = ["--lake", lake, "--start", DAYS[0], "--end", DAYS[0], "--out", runs / "out"]
    model = ["--model", fitted / "model.json", *days]
    refused = {
        ("--set", "window=30"): "window = 30: the model of AAAUSDT was fitted with 20; use that",
        ("--set", "asof=inclusive"): "asof = 'inclusive': the model of AAAUSDT was fitted with 'strict'",
        ("--set", "book=quotes"): "book = 'quotes': the model of AAAUSDT was fitted with 'book_snapshot_25'",
        ("--set", "k=4"): "k: is the model's own when labelling; leave it out",
        ("--symbol", "BBBUSDT"): "no symbol BBBUSDT of testex",
        ("--exchange", "moon"): "moon",
    }
    for arguments, message in refused.items():
        assert_refused(clusterlob("label", *model, *arguments), message, runs)
    assert_refused(clusterlob("label", "--model", fitted / "no.json", *days), "no.json: cannot be read", runs)
    broken = fitted / "run.json"
    assert_refused(clusterlob("label", "--model", broken, *days), "run.json: not a model.json", runs)


# ---- lakes, help ------------------------------------------------------------------------------------


def test_check__lists_the_lake(clusterlob: Run, lake: Path) -> None:
    code, out, err = clusterlob("check", "--lake", lake)
    assert (code, err) == (0, "")
    for word in (EXCHANGE, SYMBOL, "trades", "book_snapshot_25", "quotes", DAYS[0]):
        assert word in out
    code, out, err = clusterlob("check", "--lake", lake, "--symbol", "XRPUSDT")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")


def test_ingest_synthetic__then_run_with_workers(clusterlob: Run, tmp_path: Path) -> None:
    """One seed makes one lake; a bad option makes none."""
    lake = tmp_path / "lake"
    made = ["ingest", "synthetic", "--lake", lake, "--trades-per-day", "5000"]
    assert_refused(clusterlob(*made, "--strength", "7"), "synthetic.strength = 7.0", tmp_path)
    code, out, err = clusterlob(*made)
    assert (code, err) == (0, "")
    assert "5,000 trades" in out
    arguments = ["--lake", lake, "--exchange", "synthetic", "--symbol", "SYNUSDT"]
    arguments += ["--start", "2024-05-01", "--end", "2024-05-01", "--out", tmp_path / "out"]
    code, _, err = clusterlob("run", "cluster", *arguments, "--workers", "1")
    assert (code, err) == (0, "")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["workers"] == "1 local workers x 1 threads"


def test_ingest_tardis__nothing_there(clusterlob: Run, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    code, _, err = clusterlob("ingest", "tardis", tmp_path / "source", "--lake", tmp_path / "lake")
    assert code == 2
    assert "Traceback" not in err
    assert not (tmp_path / "lake").exists()


def in_a_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


def test_help__is_quick_and_lists_the_commands() -> None:
    """It imports none of the heavy libraries."""
    printed = in_a_process(
        "import sys; sys.argv = ['clusterlob', '--help']\n"
        "from clusterlob_gpu import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'pandas', 'numba', 'pyarrow', 'distributed', 'sklearn', 'scipy', 'matplotlib', 'numpy'}\n"
        "print('heavy:', sorted(heavy & set(sys.modules)))"
    )
    assert "heavy: []" in printed
    for command in ("check", "demo", "info", "ingest", "label", "report", "run"):
        assert f"  {command} " in printed


def test_version(clusterlob: Run) -> None:
    assert clusterlob("--version") == (0, f"clusterlob, version {__version__}\n", "")


def test_console_script__exit_code_and_one_line() -> None:
    """As a process of its own, without a terminal."""
    script = "from clusterlob_gpu.cli import main; import sys; sys.argv = ['clusterlob', *{}]; main()"
    arguments = ["check", "--lake", "/"]
    done = subprocess.run(
        [sys.executable, "-c", script.format(arguments)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
