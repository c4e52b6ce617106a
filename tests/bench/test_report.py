from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from imagen_fast import provenance
from imagen_fast.bench import plots, report, results
from imagen_fast.bench.floor import CopyRate, Limits, MatmulRate
from imagen_fast.bench.results import Cost, Failure, Result, Row, Skip
from imagen_fast.bench.timing import Settings, Timing
from imagen_fast.errors import UserError

SOURCE = provenance.Provenance(
    machine="AMD EPYC 9B45",
    cores=2,
    threads=2,
    capability="AVX512",
    memory_gib=23.5,
    last_level_cache_mib=32.0,
    load=0.1,
    system="Linux",
    python="3.11.7",
    torch="2.13.0+cpu",
    imagen_fast="0.1.0",
    compiler="c++ 12.2.0",
    commit="0123456789abcdef",
    dirty=True,
    date="2026-11-23T07:37:55+00:00",
    command="imagen-fast bench",
    libraries=("numpy 2.4.6",),
)


def row(case: str = "small", peer: str = "eager", **changes: Any) -> Row:
    values = Row(
        case=case,
        title="2×128×64×64, silu",
        shape=(2, 128, 64, 64),
        dtype="bf16",
        layout="nhwc",
        direction="forward_backward",
        tags=("headline",),
        backend="cpu",
        peer=peer,
        variant="default",
        ours=Timing(1.5e-4, 1.4e-4, 1.6e-4, 100, 300),
        theirs=Timing(1.2e-3, 1.1e-3, 1.3e-3, 100, 200),
        ratio=8.0,
        floor=4e-5,
        percent_of_floor=26.7,
        error=0.002,
        allowed_error=0.03,
        peer_error=0.004,
        worst="output",
        preparation=1e-6,
        interleaved=True,
    )
    return dataclasses.replace(values, **changes)


@pytest.fixture
def result() -> Result:
    return Result(
        op="group_norm_act",
        provenance=SOURCE,
        settings=Settings(),
        limits=Limits((CopyRate(4096, 1e10),), (MatmulRate("bf16", 5e11),)),
        rows=(
            row(),
            row(peer="compile", ratio=3.0, preparation=3.21),
            row(case="large", tags=(), ours=Timing(2.5e-6, 2e-6, 3e-6, 9, 9)),
        ),
        failures=(Failure("odd", "cpu", "why"),),
        complete=True,
    )


def test_a_result_survives_its_file(result: Result, tmp_path: Path) -> None:
    path = result.write(tmp_path)
    assert path.name == "group_norm_act-amd-epyc-9b45-2-threads.json"
    assert results.load(path) == result


def test_cold_results_have_a_file_of_their_own(result: Result) -> None:
    cold = dataclasses.replace(result, settings=Settings(cold=True))
    assert cold.name == f"{result.name}-cold"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda v: v["rows"][0].update(speed=1), "unknown key 'speed'", id="unknown key"),
        pytest.param(lambda v: v["rows"][1].pop("ratio"), "missing key 'ratio'", id="missing key"),
        pytest.param(lambda v: v.update(schema=2), "schema 1 .found 2", id="other schema"),
        pytest.param(lambda v: v["rows"][0].update(ratio="fast"), "must be float", id="wrong type"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(change: Any, message: str, result: Result, tmp_path: Path) -> None:
    path = result.write(tmp_path)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        results.load(path)


def test_markdown(result: Result) -> None:
    text = report.markdown(result)
    head, _, header, _, small, large, _, note = text.splitlines()
    assert "AMD EPYC 9B45, 2 threads" in head
    assert "commit 0123456789 with changes" in head
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, small, large)]
    assert cells[0][5:] == ["ours", "eager", "speed-up", "compile", "speed-up", "of floor", "error (allowed)"]
    assert cells[1][1:6] == ["bf16", "NHWC", "forward + backward", "cpu", "0.150 ms"]
    assert cells[1][6:] == ["1.2 ms", "8.00×", "1.2 ms", "3.00×", "27 %", "2.0e-03 (3.0e-02)"]
    assert cells[2][5] == "2.5 µs"
    assert note == "compile: 3.2 s of preparation for each case (median), which is not counted."
    assert cells[2][8:10] == ["", ""]  # not timed against compile


def of_models(result: Result) -> Result:
    """The same with two rows of a model in a batch of two, and one in a batch of eight."""
    costs = {"our_cost": Cost.of(2, 0.15, 0.25, 1024.0), "their_cost": Cost.of(2, 1.2, 31.0, 1536.0)}
    large = {"our_cost": Cost.of(8, 0.5, 0.75, 1024.0), "their_cost": Cost.of(8, 4.0, 33.0, 1536.0)}
    rows = (
        row(**costs),
        row(peer="compile", ratio=1.5, theirs=Timing(2.25e-4, 2e-4, 3e-4, 9, 9), **costs),
        row(case="large", title="8×128×64×64, silu", shape=(8, 128, 64, 64), **large),
    )
    return dataclasses.replace(result, rows=rows)


def cells(table: str) -> list[list[str]]:
    """Of a Markdown table, without its header."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_models_have_a_line_for_each_contender(result: Result) -> None:
    _, table, _ = report.markdown(of_models(result)).split("\n\n")
    assert [line[2:] for line in cells(table)[:3]] == [
        ["**imagen_fast**", "0.150 ms", "", "13.3", "0.1 s", "0.2 s", "1.00 GiB", "2.0e-03"],
        ["eager (default)", "1.2 ms", "8.00×", "1.67", "29.8 s", "31.0 s", "1.50 GiB", "4.0e-03"],
        ["compile (default)", "0.225 ms", "1.50×", "1.67", "29.8 s", "31.0 s", "1.50 GiB", "4.0e-03"],
    ]


def test_throughput_of_a_model_stands_side_by_side_for_its_batches(result: Result) -> None:
    *_, table = report.markdown(of_models(result)).split("\n\n")
    assert table.splitlines()[0].split("|")[-3:-1] == ["   batch 2 ", "   batch 8 "]
    assert cells(table) == [
        ["B×128×64×64, silu", "bf16", "**imagen_fast**", "13.3", "16"],
        ["B×128×64×64, silu", "bf16", "eager", "1.67", "2"],
        ["B×128×64×64, silu", "bf16", "compile", "1.67", ""],
    ]


def test_a_model_in_one_batch_has_no_table_of_throughput(result: Result) -> None:
    assert not report.throughput(dataclasses.replace(result, rows=of_models(result).rows[:2]))


def test_an_ordinary_call_is_no_preparation() -> None:
    assert Cost.of(2, 0.5, 3.0, 1.0) == Cost(first_result=3.0, preparation=2.5, throughput=4.0, memory=1.0)
    assert Cost.of(1, 0.5, 0.4, 1.0).preparation == 0


def test_cases_that_are_left_out_are_told_with_the_reason(result: Result) -> None:
    skipped = dataclasses.replace(result, skipped=(Skip("huge", "too large"), Skip("huger", "too large")))
    assert report.markdown(skipped).splitlines()[-1] == "not run: huge, huger: too large."


@pytest.mark.parametrize("form", [lambda result: result, of_models], ids=["ops", "models"])
def test_plot_is_a_picture(form: Any, result: Result, tmp_path: Path) -> None:
    plots.plot(form(result), tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 20


def test_command_writes_table_and_plot(result: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"{result.name}-fp32"  # the file's own name, so that two of one op stay apart
    path = result.write(tmp_path).rename(tmp_path / f"{name}.json")
    assert report.main([str(path), "--output", str(tmp_path / "report"), "--tag", "headline"]) == 0
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == [f"{name}.md", f"{name}.png"]
    assert (tmp_path / "report" / f"{name}.md").read_text().strip() == capsys.readouterr().out.strip()


def test_command_reports_a_missing_file_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path / "none.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_provenance_of_this_machine() -> None:
    found = provenance.collect()
    assert found.cores >= 1
    assert found.machine
    assert found.slug.endswith(f"-{found.threads}-threads")
    assert "/" not in found.command.split()[0]


def test_command_line_is_recorded_without_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/imagen-fast", "bench", "--output", "/else/where", "--case", "a|b"])
    assert provenance.collect().command == "imagen-fast bench --output where --case 'a|b'"


@pytest.mark.parametrize(("text", "size"), [("48K\n", 48 << 10), ("32768K", 32 << 20), ("2M", 2 << 20), ("64", 64)])
def test_cache_sizes(text: str, size: int) -> None:
    assert provenance._bytes(text) == size
