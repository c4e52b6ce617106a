"""Imports imagen-pytorch where it is on the path, without what it depends on.

It imports torchvision, kornia and others for training, which these tests do not do: empty modules stand for them
while it is imported. The width of its default text encoder it looks up on a hub: here it is told.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from typing import Any
from unittest import mock

import pytest

if importlib.util.find_spec("imagen_pytorch") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from transformers import T5Config, T5EncoderModel, T5Tokenizer  # noqa: F401  # before the modules that stand in

    class _Empty(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    _ABSENT = [
        *("torchvision", "torchvision.transforms", "kornia", "kornia.augmentation"),
        *("datasets", "datasets.utils", "datasets.utils.file_utils", "pytorch_warmup", "ema_pytorch", "accelerate"),
    ]
    sys.modules |= {name: _Empty(name) for name in _ABSENT}
    try:
        with mock.patch.object(T5Config, "from_pretrained", return_value=T5Config(d_model=768)):
            import imagen_pytorch
    finally:
        for name in _ABSENT:
            del sys.modules[name]
    expected = os.environ.get("IMAGEN_FAST_EXPECT_HOST")
    if expected is not None and imagen_pytorch.__version__ != expected:
        raise pytest.UsageError(f"imagen-pytorch is {imagen_pytorch.__version__}, and {expected} was to be tested")
