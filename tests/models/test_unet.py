"""The U-Nets: shapes, what conditions them, the paper's sizes, and errors."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from imagen_fast.models import EfficientUNet, EfficientUNetConfig, ImagenConfig, UNet, UNetConfig

README = Path(__file__).parents[2] / "README.md"
BASE = UNetConfig(16, (1, 2), 1, (1,), 8, text_dim=12, groups=4)
SUPER = EfficientUNetConfig(16, (1, 2), (1, 2), (1,), (1,), heads=4, text_dim=12, groups=4)


def randomized(model):
    """Blocks start as identities; random weights everywhere make every input matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.5 / max(1, p[0].numel()) ** 0.5))
    return model.double().eval()


@pytest.fixture(scope="module")
def base():
    return randomized(UNet(BASE))


@pytest.fixture(scope="module")
def super_resolution():
    return randomized(EfficientUNet(SUPER))


def inputs(channels: int, size: int = 16, batch: int = 2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, size, size, generator=generator, dtype=torch.float64)
    text = torch.randn(batch, 5, 12, generator=generator, dtype=torch.float64)
    return x, torch.tensor([3, 700])[:batch], text, torch.ones(batch, 5, dtype=torch.bool)


def test_base_keeps_the_shape_and_depends_on_every_input(base):
    x, t, text, mask = inputs(3)
    y = base(x, t, text, mask)
    assert y.shape == x.shape
    for changed in ((x + 0.1, t, text, mask), (x, t + 9, text, mask), (x, t, text.flip(1) * 2, mask)):
        assert (base(*changed) - y).abs().max() > 1e-6


def test_base_ignores_masked_text_whatever_it_holds(base):
    x, t, text, mask = inputs(3)
    mask[:, 3:] = False
    y = base(x, t, text, mask)
    torch.testing.assert_close(base(x, t, text[:, :3], mask[:, :3]), y)
    text[:, 3:] = 1e4
    torch.testing.assert_close(base(x, t, text, mask), y)


def test_no_text_is_the_same_as_a_mask_of_false(base):
    x, t, text, mask = inputs(3)
    torch.testing.assert_close(base(x, t), base(x, t, text, torch.zeros_like(mask)))
    assert (base(x, t) - base(x, t, text, mask)).abs().max() > 1e-6


def test_a_sample_does_not_depend_on_its_batch(base, super_resolution):
    x, t, text, mask = inputs(3)
    torch.testing.assert_close(base(x, t, text, mask)[1:], base(x[1:], t[1:], text[1:], mask[1:]))
    x, t, text, mask = inputs(6)
    together = super_resolution(x, t, text, mask, augmentation=t)
    torch.testing.assert_close(together[1:], super_resolution(x[1:], t[1:], text[1:], mask[1:], augmentation=t[1:]))


def test_efficient_unet_depends_on_every_input(super_resolution):
    x, t, text, mask = inputs(6)
    level = torch.tensor([0, 100])
    y = super_resolution(x, t, text, mask, augmentation=level)
    assert y.shape == (2, 3, 16, 16)
    low = x.clone()
    low[:, 3:] += 0.1
    for changed in ((low, t, text), (x, t + 9, text), (x, t, text * 2)):
        assert (super_resolution(*changed, mask, augmentation=level) - y).abs().max() > 1e-6
    assert (super_resolution(x, t, text, mask, augmentation=level + 50) - y).abs().max() > 1e-6


def test_models_without_text_take_none():
    base = UNet(dataclasses.replace(BASE, text_dim=None))
    assert base(torch.randn(1, 3, 8, 8), torch.tensor([5])).shape == (1, 3, 8, 8)
    config = dataclasses.replace(SUPER, text_dim=None, cross_attention_levels=())
    x, t = torch.randn(1, 6, 8, 8), torch.tensor([5])
    assert EfficientUNet(config)(x, t, augmentation=t).shape == (1, 3, 8, 8)


def test_residual_blocks_start_as_identities():
    attention = UNet(BASE).middle1.attention
    h = torch.randn(2, 32, 4, 4)
    assert torch.equal(attention(h, None), h)


@pytest.mark.parametrize("stage", range(3), ids=["base", "super_256", "super_1024"])
def test_the_papers_sizes_are_those_of_the_readme(stage):
    """Each row of the table there holds the count here, the published one, and the difference."""
    with torch.device("meta"):
        model = ImagenConfig.paper().stages[stage].build()
    count = sum(p.numel() for p in model.parameters())
    rows = re.findall(r"\| ([\d.]+) ([BM]) \| ([\d.]+) ([BM]) \| ([+−]\d+) % \|", README.read_text(encoding="utf-8"))
    here, unit, published, published_unit, difference = rows[stage]
    scale = {"B": 1e9, "M": 1e6}
    assert float(here) == pytest.approx(count / scale[unit], abs=0.005 if unit == "B" else 0.5)
    ratio = count / (float(published) * scale[published_unit])
    assert int(difference.replace("−", "-")) == round(100 * (ratio - 1))


SHARED_MISTAKES = [
    ({"channels": 17}, "even"),
    ({"text_dim": 0}, "text_dim must be positive or None, got 0"),
    ({"in_channels": 0}, "in_channels and out_channels must be positive"),
    ({"out_channels": -1}, "in_channels and out_channels must be positive"),
    ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
    ({"dropout": -0.1}, "dropout"),
    ({"dropout": float("nan")}, "dropout"),
]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"multipliers": ()}, "positive"),
        ({"attention_levels": (2,)}, "attention_levels"),
        ({"head_width": 7}, "head_width"),
        ({"head_width": 0}, "head_width"),
        ({"groups": 0}, "groups"),
        ({"multipliers": (2, 1), "attention_levels": (0,), "head_width": 32}, "level 1's 16 channels"),
        *SHARED_MISTAKES,
    ],
)
def test_base_config_rejects(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": (1,)}, "blocks"),
        ({"text_dim": None}, "text_dim"),
        ({"self_attention_levels": (4,)}, "levels"),
        ({"heads": 5}, "heads"),
        ({"heads": 0}, "heads"),
        ({"groups": 0}, "groups"),
        ({"blocks": (1, 0)}, "blocks"),
        *SHARED_MISTAKES,
    ],
)
def test_efficient_config_rejects(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SUPER, **change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda x, t, text, mask: (x[:, :2], t, text, mask), "x must be"),
        (lambda x, t, text, mask: (x[:, :, :15], t, text, mask), "divisible"),
        (lambda x, t, text, mask: (x, t[:1], text, mask), "timestep"),
        (lambda x, t, text, mask: (x, t, text[:, :, :4], mask), "text must be"),
        (lambda x, t, text, mask: (x, t, text, mask[:, :2]), "text_mask"),
    ],
    ids=["channels", "size", "timestep", "text", "mask"],
)
def test_forward_rejects(base, arguments, message):
    with pytest.raises(ValueError, match=message):
        base(*arguments(*inputs(3)))
