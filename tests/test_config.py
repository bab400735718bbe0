"""The config: every field's bad value is named, durations, presets, and what run.json records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from clusterlob_gpu.config import (
    ClusterConfig,
    config_hash,
    format_duration,
    make_config,
    parse_duration,
    preset_names,
    read_preset,
    read_yaml,
)
from clusterlob_gpu.errors import ConfigError, InputError

DEFAULTS = {
    "book": "book_snapshot_25",
    "depth": 5,
    "max_staleness": "1m",
    "seed": 7,
    "on_bad_day": "fail",
    "window": 100,
    "same_side": "own",
    "spread": "ticks",
    "asof": "strict",
    "k": 3,
    "n_init": 5,
    "engine": "auto",
    "margin": 0.0,
    "winsorize": None,
    "bucket": "5m",
    "horizons": ["5m", "15m", "1h"],
    "keep_trades": False,
    "train_days": None,
    "test_days": 1,
    "step_days": 1,
    "purge": None,
}
BAD: dict[str, list[Any]] = {
    "book": ["trades", 5, None],
    "depth": [0, 26, 2.5, "deep"],
    "max_staleness": ["60", "0s", "-1s", "1 week", 60, None],
    "seed": [-1, 2**32, "x"],
    "on_bad_day": ["ignore", True],
    "window": [1, 100_001, None],
    "same_side": ["theirs"],
    "spread": ["pips"],
    "asof": ["later"],
    "k": [1, 65, "many", None],
    "n_init": [0],
    "engine": ["gpu"],
    "margin": [-0.1, float("nan"), "wide"],
    "winsorize": [[0.9, 0.1], [0.5, 0.5], [-0.1, 0.9], [0.1, 1.1], [0.1], 0.1],
    "bucket": ["7m", "25h", "100ms", "0m", 300],
    "horizons": [[], ["5m", "5m"], ["60m", "1h"], ["soon"], "5m"],
    "keep_trades": ["perhaps", 2],
    "train_days": [0, "week"],
    "test_days": [0],
    "step_days": [0],
    "purge": ["30m", "0s"],
}


def test_defaults__are_those_of_the_specification() -> None:
    assert make_config({}).resolved() == DEFAULTS
    assert set(ClusterConfig.model_fields) == set(DEFAULTS) == set(BAD)


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in BAD for value in BAD[field]])
def test_bad_value__names_the_field(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({field: value})
    text = str(caught.value)
    assert text.startswith((f"{field} = ", f"{field}."))
    assert "\n" not in text
    assert caught.value.exit_code == 2


def test_consistency__windows_may_not_overlap() -> None:
    with pytest.raises(ConfigError, match="step_days = 1: must be at least test_days = 2"):
        make_config({"train_days": 7, "test_days": 2})
    assert make_config({"test_days": 2}).test_days == 2


def test_consistency__the_purge_leaves_something_to_train_on() -> None:
    with pytest.raises(ConfigError, match="train_days = 1: the purge of 1d leaves no training day"):
        make_config({"train_days": 1, "purge": "24h"})
    assert make_config({"train_days": 2, "purge": "24h"}).train_days == 2


def test_unknown_key__tells_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"^colour: no such key; known keys are book, depth, .*purge$"):
        make_config({"colour": "red"})


def test_config__is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        make_config({}).k = 4  # type: ignore[misc]


# ---- durations --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "us"),
    [
        ("100us", 100),
        ("250ms", 250_000),
        ("10s", 10_000_000),
        ("5m", 300_000_000),
        ("72h", 259_200_000_000),
        ("1d", 86_400_000_000),
        (" 5m ", 300_000_000),
    ],
)
def test_parse_duration__by_hand(text: str, us: int) -> None:
    assert parse_duration(text) == us


@pytest.mark.parametrize(
    "text", ["", "5", "m", "5 m", "1.5h", "-5m", "0s", "5m5s", "5w", None, 300, 5.0, True]
)
def test_parse_duration__refuses(text: object) -> None:
    with pytest.raises(ValueError, match="must be a positive duration such as 10s, 5m, 72h or 1d"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("us", "text"),
    [(1, "1us"), (1_500, "1500us"), (300_000_000, "5m"), (259_200_000_000, "3d"), (5_400_000_000, "90m")],
)
def test_format_duration__shortest(us: int, text: str) -> None:
    assert format_duration(us) == text


@given(st.integers(1, 366 * 86_400 * 10**6))
def test_durations__round_trip(us: int) -> None:
    assert parse_duration(format_duration(us)) == us


# ---- files and settings -----------------------------------------------------------------------------


def test_resolved__round_trips() -> None:
    config = make_config(
        {"bucket": "90s", "horizons": ["250ms", "36h"], "winsorize": [0.01, 0.99], "purge": "2d", "k": 5}
    )
    plain = config.resolved()
    assert plain["horizons"] == ["250ms", "36h"]
    assert make_config(plain) == config
    assert make_config(yaml.safe_load(yaml.safe_dump(plain))) == config
    assert config_hash(make_config(plain).resolved()) == config_hash(plain)
    assert config_hash(plain) != config_hash(DEFAULTS)


def test_reach__is_what_targets_look_ahead() -> None:
    config = make_config({"bucket": "5m", "horizons": ["1m", "1h"]})
    assert config.reach == 65 * 60 * 10**6
    assert config.purge_us == config.reach
    assert make_config({"bucket": "5m", "horizons": ["1m"]}).reach == 10 * 60 * 10**6
    assert make_config({"purge": "3h"}).purge_us == 3 * 3600 * 10**6


def test_settings__are_yaml_and_win_over_the_file() -> None:
    settings = ["k=4", "horizons=[5m, 1h]", "winsorize=[0.01, 0.99]", "train_days=null", "keep_trades=true"]
    config = make_config({"k": 5, "depth": 10, "train_days": 7}, [*settings, "spread = bps"])
    assert (config.k, config.depth, config.train_days, config.keep_trades) == (4, 10, None, True)
    assert config.winsorize == (0.01, 0.99)
    assert config.resolved()["horizons"] == ["5m", "1h"]
    assert config.spread == "bps"
    assert make_config({}, ["k=4", "k=6"]).k == 6


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("k", "--set k: must be key=value"),
        ("k=", "k = None: "),
        ("=4", ": no such key"),
        ("k=many", "k = 'many': "),
        ("horizons=[5m", r"--set horizons=\[5m: '\[5m' is not a YAML value"),
    ],
)
def test_settings__broken_one_is_named(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make_config({}, [setting])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"k: [\n", "not valid YAML"),
        (b"- k\n", "must hold keys and values, found a list"),
        (b"3\n", "must hold keys and values, found a int"),
        (b"1: 2\n", "every key must be text"),
    ],
)
def test_read_yaml__broken_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        make_config(read_yaml(file))
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_read_yaml__empty_and_absent(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert read_yaml(tmp_path / "empty.yaml") == {}
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read: No such file"):
        read_yaml(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_yaml(tmp_path)


# ---- presets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", preset_names())
def test_presets__load_and_validate(name: str) -> None:
    preset = read_preset(name)
    assert preset.start <= preset.end
    assert preset.symbols
    if preset.experiment == "cluster":
        assert make_config(preset.config).resolved().keys() == DEFAULTS.keys()


def test_preset__unknown_name_tells_the_known_ones() -> None:
    with pytest.raises(
        InputError, match="--preset nothing: no such preset; there are .*" + preset_names()[0]
    ):
        read_preset("nothing")
