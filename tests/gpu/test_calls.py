from __future__ import annotations

import pytest
import torch

from imagen_fast import ops

from .calls import CALLS


def test_every_op_has_a_call_for_the_device() -> None:
    assert set(ops.__all__) <= set(CALLS)


def test_the_rest_is_collected_where_there_is_a_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: the other files here are not collected (make test-gpu runs them)")
