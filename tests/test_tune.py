"""Tuning with times that are made up: what is tried, what is kept, what is written."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from imagen_fast import _triton, cli, tune
from imagen_fast.errors import OutputError

H200, MI300 = _triton.KNOWN_DEVICES["9.0"], _triton.KNOWN_DEVICES["gfx942"]
TABLE: tune.Table = {
    "forward": {
        "default": [{"up_to": 64, "tile": 32, "num_warps": 4}, {"up_to": 256, "tile": 128, "num_warps": 8}],
        "gfx9": [{"up_to": 256, "tile": 64, "num_warps": 4}],
    },
    "backward": {"default": [{"tile": 32, "num_warps": 4, "num_stages": 2}]},
}


@pytest.fixture
def configurations() -> _triton.Configurations:
    made = object.__new__(_triton.Configurations)
    made.table = copy.deepcopy(TABLE)
    return made


def timer(configurations: _triton.Configurations, device: _triton.Device, best_tile: int) -> Callable[[int], float]:
    """A case is a size; its forward is the faster the nearer the tile is to the best one, and cannot run at 512."""

    def seconds(size: int) -> float:
        row = configurations.find("forward", device, size)
        if row is None or row["tile"] >= 512:
            return math.inf
        return 1.0 + abs(math.log2(row["tile"] / best_tile))

    return seconds


def test_the_neighbours_of_a_row() -> None:
    found = list(tune.candidates({"up_to": 64, "tile": 1, "num_warps": 32, "num_stages": 1}, H200))
    assert found == [
        {"up_to": 64, "tile": 2, "num_warps": 32, "num_stages": 1},
        {"up_to": 64, "tile": 1, "num_warps": 16, "num_stages": 1},
        {"up_to": 64, "tile": 1, "num_warps": 32, "num_stages": 2},
    ]
    assert {"num_warps": 32} not in tune.candidates({"num_warps": 16}, MI300)  # 2048 threads


def test_only_rows_that_cases_use_change_and_only_for_the_device(configurations: _triton.Configurations) -> None:
    table, changes = tune.tune(configurations, H200, [50, 60], timer(configurations, H200, 256))
    assert changes == [
        tune.Change("forward", TABLE["forward"]["default"][0], {"up_to": 64, "tile": 256, "num_warps": 4}, 1 / 4)
    ]
    assert table["forward"].pop("9.0") == [changes[0].after, TABLE["forward"]["default"][1]]
    assert table == TABLE
    assert configurations.table == TABLE


def test_a_row_of_a_family_is_copied_before_it_changes(configurations: _triton.Configurations) -> None:
    table, _ = tune.tune(configurations, MI300, [200], timer(configurations, MI300, 128))
    assert table["forward"].pop("gfx942") == [{"up_to": 256, "tile": 128, "num_warps": 4}]
    assert table == TABLE


def test_nothing_changes_where_nothing_is_faster(configurations: _triton.Configurations) -> None:
    assert tune.tune(configurations, H200, [50], timer(configurations, H200, 32)) == (TABLE, [])
    noise = iter(1.0 - 0.015 * (i % 2) for i in range(1000))

    def noisy(size: int) -> float:
        configurations.find("forward", H200, size)
        return next(noise)

    assert tune.tune(configurations, H200, [50], noisy) == (TABLE, [])


def test_what_cannot_run_is_never_kept(configurations: _triton.Configurations) -> None:
    table, _ = tune.tune(configurations, H200, [50, 1000], timer(configurations, H200, 4096))
    assert table["forward"]["9.0"][0]["tile"] == 256
    assert configurations.table == TABLE


def test_a_row_is_judged_by_all_its_cases(configurations: _triton.Configurations) -> None:
    def seconds(size: int) -> float:
        tile = configurations.find("forward", H200, size)["tile"]  # type: ignore[index]
        # One case wants small tiles, the other large ones, and gains more by them.
        return max(tile, 16) / 32 if size == 10 else (32 / min(tile, 128)) ** 2

    table, changes = tune.tune(configurations, H200, [10, 20], seconds)
    assert table["forward"]["9.0"][0]["tile"] == 128
    assert changes[0].ratio == pytest.approx((4 / 16) ** 0.5)
    assert tune.tune(configurations, H200, [10], seconds)[0]["forward"]["9.0"][0]["tile"] == 16


def test_no_time_left(configurations: _triton.Configurations) -> None:
    assert tune.tune(configurations, H200, [50], timer(configurations, H200, 256), deadline=0.0) == (TABLE, [])


def test_a_mistake_leaves_the_table_as_it_was(configurations: _triton.Configurations) -> None:
    def seconds(size: int) -> float:
        if configurations.find("forward", H200, size)["num_warps"] != 4:  # type: ignore[index]
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        tune.tune(configurations, H200, [50], seconds)
    assert configurations.table == TABLE
    assert "find" not in vars(configurations)


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[1] / "kernels" / "triton").glob("*.json")), ids=str)
def test_the_committed_tables_are_as_they_would_be_written(file: Path) -> None:
    assert tune.text(json.loads(file.read_text())) == file.read_text()


def test_a_file_is_whole_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "op.json"
    tune.write(TABLE, path)
    assert json.loads(path.read_text()) == TABLE
    written = path.read_text()

    def full_disk(self: Path, data: str) -> int:
        with self.open("w") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OutputError, match="No space left"):
        tune.write({"forward": {}}, path)
    assert path.read_text() == written
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["tune", "--output", str(tmp_path)]) == cli.USER_MISTAKE
    captured: Any = capsys.readouterr()
    assert captured.err == "imagen-fast: error: tune needs a GPU, and PyTorch finds no CUDA device here\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_run_writes_the_tables_of_the_chosen_ops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    kernels = _triton.kernels("group_norm_act")

    def seconds(case: Any) -> float:
        warps = kernels.CONFIGURATIONS["parameters", H200]["num_warps"]
        return 2.0 if warps == 4 else 1.0 if warps == 2 else 3.0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "on_the_device", seconds)
    monkeypatch.setattr(tune, "current_device", lambda: H200)
    ((op, path, changes),) = tune.run(["group_norm_act"], case="4x64x8x8", output=tmp_path)
    assert (op, path, [change.kind for change in changes]) == (
        "group_norm_act",
        tmp_path / "group_norm_act.json",
        ["parameters"],
    )
    written = json.loads(path.read_text())
    assert written["parameters"].pop("9.0")[0]["num_warps"] == 2
    assert written == kernels.CONFIGURATIONS.table
    with pytest.raises(ValueError, match="'group_norm'"):
        next(tune.run(["group_norm"], output=tmp_path))
