"""Guidance, thresholding and errors of the reference sampler step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from imagen_fast.diffusion import DynamicThreshold, Guidance, StepTable, squaredcos_cap_v2
from imagen_fast.reference.sampler_step import sampler_step

ALPHAS = squaredcos_cap_v2(1000)
X0 = StepTable.ddim(ALPHAS, steps=4, prediction="x0")  # the output is x0, so thresholding is seen directly
LEARNED = StepTable.ddpm(ALPHAS, steps=4, variance="learned_range")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_guidance_extrapolates():
    sample, conditional, unconditional = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1), randn(2, 3, 4, 4, seed=2)
    _, x0 = sampler_step(sample, conditional, X0, 0, unconditional_output=unconditional, guidance=3.0)
    torch.testing.assert_close(x0, unconditional + 3.0 * (conditional - unconditional))
    _, x0 = sampler_step(sample, conditional, X0, 0, unconditional_output=unconditional, guidance=1.0)
    torch.testing.assert_close(x0, conditional)


def test_rescale_keeps_the_conditional_deviation():
    sample, conditional, unconditional = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1), randn(2, 3, 4, 4, seed=2)
    guidance = Guidance(5.0, rescale=1.0)
    _, x0 = sampler_step(sample, conditional, X0, 0, unconditional_output=unconditional, guidance=guidance)
    torch.testing.assert_close(x0.std((1, 2, 3)), conditional.std((1, 2, 3)))


def test_remove_parallel_leaves_the_orthogonal_part():
    sample, conditional, unconditional = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1), randn(2, 3, 4, 4, seed=2)
    guidance = Guidance(5.0, remove_parallel=True)
    _, x0 = sampler_step(sample, conditional, X0, 0, unconditional_output=unconditional, guidance=guidance)
    overlap = ((x0 - conditional) * conditional).sum((1, 2, 3))
    torch.testing.assert_close(overlap, torch.zeros(2), atol=1e-3, rtol=0)
    assert (x0 - conditional).abs().max() > 0.1


@pytest.mark.parametrize("percentile", [0.0, 0.5, 0.95, 0.995, 1.0])
def test_dynamic_threshold_is_per_sample(percentile):
    output = randn(2, 3, 8, 8) * torch.tensor([0.2, 5.0]).view(2, 1, 1, 1)
    threshold = DynamicThreshold(percentile)
    _, x0 = sampler_step(torch.zeros_like(output), output, X0, 0, threshold=threshold)
    for b in range(2):
        s = max(1.0, np.quantile(output[b].abs().double().numpy(), percentile))
        torch.testing.assert_close(x0[b], output[b].clamp(-s, s) / s)


def test_dynamic_threshold_of_float64_is_not_rounded():
    output = 5 * randn(1, 3, 8, 8).double()
    _, x0 = sampler_step(output, output, X0, 0, threshold=DynamicThreshold(0.6))
    s = output.abs().flatten().quantile(0.6)
    torch.testing.assert_close(x0, output.clamp(-s, s) / s, rtol=1e-14, atol=0)


def test_threshold_maximum_and_static():
    output = randn(1, 3, 8, 8) * 5
    _, x0 = sampler_step(output, output, X0, 0, threshold=DynamicThreshold(0.95, max_value=1.5))
    torch.testing.assert_close(x0, output.clamp(-1.5, 1.5) / 1.5)
    _, x0 = sampler_step(output, output, X0, 0, threshold="static")
    torch.testing.assert_close(x0, output.clamp(-1, 1))


def test_an_empty_batch_works():
    empty = torch.empty(0, 3, 4, 4)
    following, x0 = sampler_step(empty, empty, X0, 0, threshold=DynamicThreshold(0.95))
    assert following.shape == x0.shape == (0, 3, 4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: sampler_step(x, x[:, :2], X0, 0), "output must have"),
        (lambda x: sampler_step(x.expand(2, 3, 4, 4), x, X0, 0), "output must be"),
        (lambda x: sampler_step(x, x, X0, 0, unconditional_output=x[:, :2]), "unconditional_output must be"),
        (lambda x: sampler_step(x, x, X0, 0, noise=x[..., :1]), "noise must be like sample"),
        (lambda x: sampler_step(x, x, LEARNED, 0, noise=x), "learned variance"),
        (lambda x: sampler_step(x[:, :1], x[:, :1], LEARNED, 0, noise=x[:, :1]), "learned variance"),
        (lambda x: sampler_step(x, x, X0, 0, threshold="dynamic"), "threshold"),
        (lambda x: sampler_step(x, x, StepTable.ddpm(ALPHAS, steps=4), 0), "noise is needed"),
        (lambda x: DynamicThreshold(1.5), "percentile"),
        (lambda x: DynamicThreshold(0.9, min_value=0.0), "min_value"),
        (lambda x: DynamicThreshold(0.9, max_value=0.5), "max_value"),
        (lambda x: Guidance(3.0, rescale=2.0), "rescale"),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call(randn(1, 3, 4, 4))
