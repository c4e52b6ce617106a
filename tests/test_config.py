"""Configurations: what a user may write into one, and what each mistake is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest

from imagen_fast.config import from_dict, read_json, to_dict
from imagen_fast.errors import CheckpointError, ConfigError, UserError


@dataclass(frozen=True)
class Layer:
    width: int
    rate: float = 0.1


@dataclass(frozen=True)
class Model:
    channels: int
    kind: Literal["base", "large"] = "base"
    scales: tuple[int, ...] = (1, 2)
    range: tuple[float, float] = (0.0, 1.0)
    layer: Layer = field(default_factory=lambda: Layer(8))
    second: Layer | None = None
    flag: bool = False
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.channels <= 0:
            raise ValueError(f"channels must be positive, got {self.channels}")


def test_round_trip_through_json_types():
    model = Model(4, "large", (1, 2, 4), (0.5, 2.0), Layer(3, 0.5), Layer(1), True, 7)
    assert from_dict(Model, to_dict(model)) == model
    assert to_dict(model)["scales"] == [1, 2, 4]


def test_fields_with_a_default_may_be_missing():
    assert from_dict(Model, {"channels": 4}) == Model(4)


def test_a_whole_number_is_a_float():
    rate = from_dict(Layer, {"width": 1, "rate": 2}).rate
    assert rate == 2.0
    assert isinstance(rate, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param({"chanels": 4}, r"model.json: unknown key 'chanels'; did you mean 'channels'\?", id="misspelt"),
        pytest.param({"channels": 4, "qqq": 1}, "unknown key 'qqq'; known keys: channels, flag, kind", id="unknown"),
        pytest.param({}, "missing key 'channels'", id="missing"),
        pytest.param({"channels": "4"}, "'channels' must be int, got '4'", id="text-for-int"),
        pytest.param({"channels": True}, "'channels' must be int, got True", id="bool-for-int"),
        pytest.param({"channels": 4.0}, "'channels' must be int, got 4.0", id="float-for-int"),
        pytest.param({"channels": None}, "'channels' must be int, got None", id="null-for-int"),
        pytest.param({"channels": 4, "flag": 1}, "'flag' must be bool, got 1", id="int-for-bool"),
        pytest.param({"channels": 4, "limit": "x"}, "'limit' must be int, got 'x'", id="text-for-optional"),
        pytest.param({"channels": 4, "kind": "huge"}, "'kind' must be one of 'base', 'large', got 'huge'", id="choice"),
        pytest.param({"channels": 4, "scales": 2}, "'scales' must be a list, got 2", id="scalar-for-list"),
        pytest.param({"channels": 4, "scales": [1, "2"]}, "'scales' must be int, got '2'", id="wrong-item"),
        pytest.param({"channels": 4, "range": [1]}, r"'range' must hold 2 values, got \[1\]", id="wrong-length"),
        pytest.param({"channels": 4, "layer": {"widht": 1}}, "'layer': unknown key 'widht'; did you mean", id="nested"),
        pytest.param({"channels": 4, "layer": 3}, "'layer': expected a table of keys, got 3", id="scalar-for-table"),
        pytest.param({"channels": 4, "second": {}}, "'second': missing key 'width'", id="optional-table"),
        pytest.param({"channels": -1}, "model.json: channels must be positive, got -1", id="range"),
    ],
)
def test_a_mistake_names_its_key(values, message):
    with pytest.raises(ConfigError, match=message) as caught:
        from_dict(Model, values, "model.json")
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "is not a checkpoint: it has no config.json", id="missing"),
        pytest.param(b"{", "is not valid JSON", id="cut-off"),
        pytest.param(b"\xff\xfe", "is not valid JSON", id="not-text"),
        pytest.param(b"[1]", "holds no JSON object", id="list"),
    ],
)
def test_read_json_says_what_is_wrong_with_the_file(tmp_path, content, message):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_json(path)


def test_read_json_reports_a_directory(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match="cannot read"):
        read_json(tmp_path / "config.json")


def test_read_json_reads_chinese(tmp_path):
    (tmp_path / "config.json").write_text('{"name": "猫"}', encoding="utf-8")
    assert read_json(tmp_path / "config.json") == {"name": "猫"}
