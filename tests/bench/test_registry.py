from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from imagen_fast import ops as library_ops
from imagen_fast.bench import registry
from imagen_fast.errors import UserError

TOY = Path(__file__).parent / "cases"
SMALL = [case for case in registry.load("group_norm_act") if registry.elements(case.shape) <= 2**20]


def test_every_op_of_the_library_has_cases_found_by_its_name() -> None:
    assert {name for name in registry.ops() if not name.startswith("model_")} == set(library_ops.__all__)


def test_models_have_cases_that_are_listed_without_their_libraries() -> None:
    code = """
import sys
from imagen_fast.bench import registry
models = [name for name in registry.ops() if name.startswith("model_")]
cases = [case for name in models for case in registry.load(name)]
assert not {"transformers", "diffusers", "onnxruntime", "openvino"} & set(sys.modules)
print(len(models), all(case.apart and case.renewed for case in cases))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["6", "True"]


def test_a_file_in_the_directory_is_an_op() -> None:
    assert registry.ops(TOY) == ["add_one", "model_scaled"]
    assert registry.load("add_one", TOY)[0].name == "right-forward"


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_group_norm_act_inputs_are_what_the_name_says(case: registry.Case) -> None:
    values = case.make_inputs(3)
    x = values["x"]
    assert tuple(x.shape) == case.shape
    assert x.dtype == case.dtype
    assert x.is_contiguous(memory_format=torch.channels_last) == (case.layout == "nhwc")
    assert {name for name in values if values[name].requires_grad} == (
        set() if case.direction == "forward" else set(values)
    )
    assert all(torch.equal(values[name], again) for name, again in case.make_inputs(3).items())
    assert not torch.equal(x, case.make_inputs(4)["x"])
    assert case.bytes >= 2 * x.numel() * x.element_size()


@pytest.mark.parametrize(
    ("given", "message"),
    [("group_norm_akt", "did you mean 'group_norm_act'"), ("zzz", "there are: abs_quantile")],
)
def test_unknown_op_names_the_nearest(given: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        registry.load(given)


def test_select_by_regular_expression() -> None:
    cases = registry.load("add_one", TOY)
    assert [case.name for case in registry.select(cases, "^right-.*ward$")] == ["right-forward", "right-backward"]
    assert registry.select(cases, None) == cases


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("wrong-fourward", "did you mean 'wrong-forward'"), ("[", "not a regular expression")],
)
def test_select_refuses(pattern: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        registry.select(registry.load("add_one", TOY), pattern)


def test_peers_are_chosen_by_name() -> None:
    cases = registry.load("add_one", TOY)
    assert registry.select_peers(cases, ["two", "eager"]) == ["eager", "two"]
    with pytest.raises(UserError, match="no peer 'eger'; did you mean 'eager'"):
        registry.select_peers(cases, ["eger"])


def test_two_cases_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "add_one.py").write_text(
        "import runpy\n"
        f"toy = runpy.run_path({str(TOY / 'add_one.py')!r})\n"
        "def cases():\n"
        "    yield from toy['cases']()\n"
        "    yield next(toy['cases']())\n"
    )
    with pytest.raises(ValueError, match=r"two cases share a name: \['right-forward'\]"):
        registry.load("add_one", tmp_path)
