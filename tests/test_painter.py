"""The second process that draws: the same files with it, without it, and after its death."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from test_report import make_run

from clusterlob_gpu import painter
from clusterlob_gpu.report import drawings, render_run


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(painter, "_cores", lambda: 2)
    with painter.painting():
        yield


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in render_run(out)}


def test_painter__draws_the_same_files(tmp_path: Path, beside: None) -> None:
    out = make_run(tmp_path / "run")
    with_it = files(out)
    (process,) = painter._beside
    assert process.poll() is None
    painter._beside.clear()
    assert files(out) == with_it
    painter._beside.append(process)


def test_painter__draws_all_of_them(tmp_path: Path, beside: None) -> None:
    out = make_run(tmp_path / "run")
    drawn = painter.ask(out)()
    assert drawn == [
        {"symbol": one.symbol, "name": one.name, "caption": one.caption} for one in drawings(out)
    ]
    found = list((out / "plots").iterdir())
    assert len(found) == len(drawn) > 2
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in found)


def test_painter__asked_for_another_run_before(tmp_path: Path, beside: None) -> None:
    """An answer that nobody waited for is not taken for that of the next run."""
    other, out = make_run(tmp_path / "other"), make_run(tmp_path / "run")
    (other / "plots").write_text("")
    painter.ask(other)
    assert painter.ask(out)() is not None
    assert list((out / "plots").iterdir())


def test_painter__that_fails_leaves_it_to_the_command(tmp_path: Path, beside: None) -> None:
    """A file where the folder of the pictures should be: the command is the one to say so."""
    out = make_run(tmp_path / "run")
    (out / "plots").write_text("")
    assert painter.ask(out)() is None
    with pytest.raises(FileExistsError):
        render_run(out)
    (process,) = painter._beside
    assert process.poll() is None


def test_painter__that_has_died_is_done_without(tmp_path: Path, beside: None) -> None:
    out = make_run(tmp_path / "run")
    (process,) = painter._beside
    process.kill()
    process.wait()
    assert "ic_BTCUSDT.png" in files(out)


def test_painting__needs_a_core_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(painter, "_cores", lambda: 1)
    with painter.painting():
        assert painter._beside == []
