"""group_norm_act in Triton's interpreter: both ways of launching it, on every kind of input."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from imagen_fast import _triton, layout, ops
from imagen_fast.testing import assert_op_as_accurate

kernels = _triton.kernels("group_norm_act")

layouts = pytest.mark.parametrize("layout_name", ["nchw", "nhwc"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def always_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """No slab fits, and tiles are so small that every loop goes round more than once."""
    table = copy.deepcopy(kernels.CONFIGURATIONS.table)
    table["forward_slab"] = table["backward_slab"] = {"default": []}
    small = {"tile": 128, "channels": 8, "programs_per_multiprocessor": 1, "most_splits": 3, "num_warps": 4}
    table["forward_split"] = table["backward_split"] = {"default": [small]}
    table["backward_join"] = {"default": [{"splits": 2, "channels": 4, "num_warps": 4}]}
    table["parameters"] = {"default": [{"samples": 2, "channels": 16, "num_warps": 4}]}
    monkeypatch.setattr(kernels.CONFIGURATIONS, "table", table)


def image(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, layout_name: str = "nchw") -> Tensor:
    x = (1.7 * torch.randn(shape) + 0.4).to(dtype)
    return layout.channels_last(x) if layout_name == "nhwc" else x


def parameters(x: Tensor) -> dict[str, Tensor]:
    batch, channels = x.shape[:2]
    scale, shift = torch.randn(batch, 2 * channels).to(x.dtype).chunk(2, dim=1)
    weight, bias = ((1 + torch.randn(channels)).to(x.dtype) for _ in range(2))
    return {"weight": weight, "bias": bias, "scale": scale, "shift": shift}


def names_of_launches(x: Tensor, groups: int, needs: int = 0b11111) -> list[str]:
    with _triton.record(_triton.KNOWN_DEVICES["9.0"]) as launches:
        affine = tuple(parameters(x).values())
        _, *statistics = kernels.forward(x, groups, *affine, 1, 1e-5)
        kernels.backward(x, x, *statistics, groups, *affine, 1, needs)
    return [launch.kernel.__name__.removeprefix("group_norm_act_").removesuffix("_kernel") for launch in launches]


def test_what_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    split_forward, split_backward = ["statistics", "apply"], ["backward_sums", "backward_join", "backward_apply"]
    assert names_of_launches(image((2, 64, 8, 8)), 8) == ["slab", "backward_slab", "norm_parameters"]
    assert names_of_launches(image((1, 64, 128, 128)), 2) == [*split_forward, *split_backward, "norm_parameters"]
    assert names_of_launches(image((1, 64, 128, 128)), 2, needs=1) == [*split_forward, *split_backward]
    assert names_of_launches(image((1, 64, 128, 128)), 2, needs=2)[2:] == [*split_backward[:2], "norm_parameters"]
    assert names_of_launches(image((0, 64, 8, 8)), 8) == ["norm_parameters"]


@pytest.mark.parametrize("nhwc", [False, True])
def test_one_sample_fills_the_chip(nhwc: bool) -> None:
    device = _triton.KNOWN_DEVICES["9.0"]
    x = torch.empty(1, 128, 256, 256, dtype=torch.bfloat16, device="meta")
    x = layout.channels_last(x) if nhwc else x
    with _triton.record(device) as launches:
        _, *statistics = kernels.forward(x, 32, None, None, None, None, 1, 1e-5)
        kernels.backward(x, x, *statistics, 32, None, None, None, None, 1, 1)
    grids = {launch.kernel.__name__: math.prod(launch.grid) for launch in launches}
    del grids["group_norm_act_backward_join_kernel"]
    assert min(grids.values()) >= 2 * device.multiprocessors


@layouts
@pytest.mark.parametrize(
    ("dtype", "activation"),
    [
        (torch.float16, "gelu_tanh"),
        (torch.bfloat16, "gelu"),
        (torch.float32, "silu"),
        (torch.float32, "gelu"),
        (torch.float32, "gelu_tanh"),
        (torch.float32, None),
    ],
    ids=str,
)
@pytest.mark.usefixtures("always_split")
def test_split(dtype: torch.dtype, layout_name: str, activation: str | None) -> None:
    x = image((2, 18, 5, 9), dtype, layout_name)
    assert_op_as_accurate(ops.group_norm_act, x, 3, **parameters(x), activation=activation)


@layouts
@pytest.mark.parametrize("channels_per_group", [22, 176])
@pytest.mark.usefixtures("always_split")
def test_split_with_channels_per_group_of_deepfloyd_if(layout_name: str, channels_per_group: int) -> None:
    x = image((1, 2 * channels_per_group, 3, 3), torch.float16, layout_name)
    assert_op_as_accurate(ops.group_norm_act, x, 2, **parameters(x), activation="gelu")


@layouts
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        pytest.param((0, 8, 4, 4), 2, id="no-samples"),
        pytest.param((2, 8, 0, 4), 2, id="no-positions"),
        pytest.param((5, 6), 2, id="rank-2"),
        pytest.param((5, 6, 1), 2, id="one-position"),
        pytest.param((2, 5, 13, 1), 5, id="one-channel-per-group"),
        pytest.param((2, 31, 5, 7), 1, id="one-group"),
        pytest.param((1, 4, 1, 259), 2, id="odd-row"),
        pytest.param((1, 8, 3, 5, 7), 4, id="rank-5"),
    ],
)
@pytest.mark.usefixtures("always_split")
def test_split_sizes(layout_name: str, shape: tuple[int, ...], groups: int) -> None:
    x = image(shape, torch.float32, layout_name)
    assert_op_as_accurate(ops.group_norm_act, x, groups, **parameters(x))


@layouts
@pytest.mark.parametrize(("mean", "deviation"), [(1000.0, 1.0), (-3e4, 20.0), (3.7, 0.0), (0.0, 1e-4)], ids=str)
@pytest.mark.usefixtures("always_split")
def test_split_mean_and_deviation(layout_name: str, mean: float, deviation: float) -> None:
    x = (deviation * torch.randn(1, 12, 9, 9, dtype=torch.float64) + mean).float()
    x = layout.channels_last(x) if layout_name == "nhwc" else x
    assert_op_as_accurate(ops.group_norm_act, x, 4, **parameters(x))


@layouts
@pytest.mark.usefixtures("always_split")
def test_split_with_channels_of_very_different_size(layout_name: str) -> None:
    x = image((1, 12, 9, 16), torch.float32, layout_name) * torch.logspace(-3, 3, 12)[:, None, None]
    x[:, 4:8] += 100 * torch.arange(4.0)[:, None, None]
    assert_op_as_accurate(ops.group_norm_act, x, 3, **parameters(x))


@layouts
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.usefixtures("always_split")
def test_split_what_is_not_finite_spoils_its_own_group_alone(layout_name: str, value: float) -> None:
    x = image((2, 12, 9, 3), torch.float32, layout_name)
    x[1, 4, 3, 2] = value
    affine = parameters(x)
    assert_op_as_accurate(ops.group_norm_act, x, 4, **affine)
    bad = ops.group_norm_act(x, 4, **affine).isnan()
    assert bad[1, 3:6].all()
    assert bad.sum() == 3 * 9 * 3


@pytest.mark.usefixtures("always_split")
def test_split_parameters_of_any_strides_and_dtypes() -> None:
    x = image((3, 12, 9, 8), torch.bfloat16)
    strided = {"weight": torch.randn(24)[::2], "bias": torch.randn(12, 2).half()[:, 1]}
    strided |= {"scale": torch.randn(12, 3).t(), "shift": torch.randn(1, 12).bfloat16().expand(3, 12)}
    assert_op_as_accurate(ops.group_norm_act, x, 3, **strided)


@pytest.mark.parametrize("absent", ["weight", "bias", "scale", "shift"])
@pytest.mark.usefixtures("always_split")
def test_split_with_a_parameter_alone_and_without_it(absent: str) -> None:
    x = image((2, 6, 9, 8))
    alone = {name: p for name, p in parameters(x).items() if name == absent}
    others = {name: p for name, p in parameters(x).items() if name != absent}
    assert_op_as_accurate(ops.group_norm_act, x, 3, **alone)
    assert_op_as_accurate(ops.group_norm_act, x, 3, **others)


@layouts
@pytest.mark.parametrize("split", [False, True], ids=["slab", "split"])
def test_same_bits_again_and_in_any_batch(layout_name: str, split: bool, request: pytest.FixtureRequest) -> None:
    if split:
        request.getfixturevalue("always_split")
    x = image((2, 12, 9, 5), torch.float32, layout_name)
    affine = parameters(x)
    runs = []
    for _ in range(2):
        leaves = [p.detach().requires_grad_() for p in (x, *affine.values())]
        y = ops.group_norm_act(leaves[0], 4, **dict(zip(affine, leaves[1:], strict=True)))
        runs.append([y.detach(), *torch.autograd.grad(y, leaves, x)])
    for first, again in zip(*runs, strict=True):
        assert torch.equal(first, again)
    for i in range(2):
        alone = {name: p[i : i + 1] if p.dim() == 2 else p for name, p in affine.items()}
        assert torch.equal(ops.group_norm_act(x[i : i + 1], 4, **alone), runs[0][0][i : i + 1])


@pytest.mark.parametrize("needed", range(5))
@pytest.mark.parametrize("split", [False, True], ids=["slab", "split"])
def test_a_gradient_for_one_tensor_alone(needed: int, split: bool, request: pytest.FixtureRequest) -> None:
    if split:
        request.getfixturevalue("always_split")
    x = image((2, 8, 5, 7))
    arguments = [x, *parameters(x).values()]

    def gradients(which: list[Tensor]) -> tuple[Tensor, ...]:
        y = ops.group_norm_act(arguments[0], 4, arguments[1], arguments[2], scale=arguments[3], shift=arguments[4])
        return torch.autograd.grad(y, which, x.detach().cos())

    (alone,) = gradients([arguments[needed].requires_grad_()])
    for argument in arguments:
        argument.requires_grad_()
    assert torch.equal(alone, gradients(arguments)[needed])


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    groups, per_group = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    rank = draw(st.integers(2, 5))
    shape = (draw(st.integers(1, 3)), groups * per_group, *(draw(st.integers(1, 5)) for _ in range(rank - 2)))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    # The gradient of a group of one or two values is what is left when all but everything cancels.
    eps = 1e-5 if per_group * math.prod(shape[2:]) >= 8 else 1.0
    x = image(shape, dtype, draw(st.sampled_from(["nchw", "nhwc"])))
    given_parameters = {name: p for name, p in parameters(x).items() if draw(st.booleans())}
    return {"x": x, "num_groups": groups, "eps": eps, **given_parameters}


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(call=calls())
@pytest.mark.usefixtures("always_split")
def test_split_any_call(call: dict[str, Any]) -> None:
    assert_op_as_accurate(ops.group_norm_act, **call)
