"""Masks and relative positions of transformers' T5 encoders: the library's, the caller's own, and padding alone."""

from __future__ import annotations

import pytest
import torch

import imagen_fast
from imagen_fast.integrations import _t5

transformers = pytest.importorskip("transformers")

from .t5_models import (  # noqa: E402  # imports transformers
    FAMILIES,
    SENTENCES,
    SIZES,
    assert_close,
    batch,
    build,
    features,
)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_an_encoder_gets_one_row_of_mask(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = []
    attended = _t5.SelfAttention.attended
    monkeypatch.setattr(
        _t5.SelfAttention, "attended", lambda self, x, mask, *rest: masks.append(mask) or attended(self, x, mask, *rest)
    )
    model = build(family)
    imagen_fast.accelerate(model)
    with torch.no_grad():
        features(model)
    batch_size, length = batch()["input_ids"].shape
    assert {mask.shape for mask in masks} == {(batch_size, 1, 1, length)}
    assert len(masks) == SIZES["num_layers"]


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_mask_of_the_callers_own_is_kept(family: str, kind: str) -> None:
    """Each token sees itself and what stands up to five places before it."""
    model = build(family)
    length = batch()["input_ids"].shape[1]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    mask = ((distance >= 0) & (distance <= 5)).expand(len(SENTENCES), 1, -1, -1)
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = features(model, attention_mask=mask)
        imagen_fast.accelerate(model)
        assert_close(features(model, attention_mask=mask), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("form", ["(B, L)", "(B, 1, 1, L)"])
def test_a_text_of_padding_alone(family: str, attention: str, form: str) -> None:
    """It attends to all its tokens alike, as in the library."""
    model = build(family, attention)
    mask = batch()["attention_mask"].clone()
    mask[1] = 0
    mask = mask if form == "(B, L)" else mask[:, None, None].bool()
    with torch.no_grad():
        expected = features(model, attention_mask=mask)
        imagen_fast.accelerate(model)
        for _ in range(4):  # from the third on as a record
            assert_close(features(model, attention_mask=mask), expected)
        assert_close(torch.compile(model, backend="eager")(**batch() | {"attention_mask": mask})[0], expected)


@pytest.mark.parametrize("shape", [(3, 90), (4, None), (3, 10)], ids=["longer", "more texts", "shorter"])
def test_a_mask_of_ones_of_another_shape(family: str, shape: tuple[int, int | None]) -> None:
    model = build(family)
    mask = torch.ones(shape[0], shape[1] or batch()["input_ids"].shape[1], dtype=torch.int64)
    with torch.no_grad():
        expected = features(model, attention_mask=mask)
        imagen_fast.accelerate(model)
        assert_close(features(model, attention_mask=mask), expected)


@pytest.mark.parametrize(("buckets", "distance"), [(128, 7), (32, 9), (32, 128)])
def test_any_buckets(family: str, buckets: int, distance: int) -> None:
    sizes = {"relative_attention_num_buckets": buckets, "relative_attention_max_distance": distance}
    model = build(family, **sizes)
    with torch.no_grad():
        expected = features(model)
        report = imagen_fast.accelerate(model)
        assert_close(features(model), expected)
    notes = [note for swapped in report.swapped for note in swapped.notes]
    assert any("buckets" in note for note in notes) == (distance == 7)
