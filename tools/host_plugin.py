"""The plugin of pytest with which `host_tests.py` runs a host library's tests: imports it, accelerates what they make.

Tests run without a network. What they would fetch fails at once, but for what stands in `MODELS`, which is made here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.machinery
import json
import os
import sys
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

VARIABLE = "IMAGEN_FAST_HOST_TESTS"

# By name on the hub: configurations of T5 that tests read. A tokenizer of printable ASCII goes with each.
MODELS = {
    "hf-internal-testing/tiny-random-t5": {
        **{"vocab_size": 256, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 5, "num_heads": 4},
        **{"relative_attention_num_buckets": 8, "decoder_start_token_id": 0},
    },
    "google/t5-v1_1-base": {
        **{"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
        **{"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0},
    },
}


@dataclasses.dataclass
class Plan:
    """What the plugin is to do.

    Attributes:
        host: the library's name as it is imported.
        classes: accelerated when they are constructed; none in a plain run.
        empty: modules that the library imports and its tests do not use; empty ones stand for them.
        counts: a folder for what was accelerated: one file of each process of pytest.
    """

    host: str
    classes: list[str]
    empty: list[str]
    counts: str

    def environment(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(dataclasses.asdict(self))}


_constructed: Counter[str] = Counter()
_accelerated: Counter[str] = Counter()


def pytest_configure(config: pytest.Config) -> None:
    plan = Plan(**json.loads(os.environ[VARIABLE]))
    config.add_cleanup(lambda: _leave_counts(Path(plan.counts)))
    with _empty_modules(plan.empty):
        library = importlib.import_module(plan.host)
    for name in plan.classes:
        _accelerate_instances(getattr(library, name))


def _leave_counts(folder: Path) -> None:
    counts = {"constructed": dict(_constructed), "accelerated": dict(_accelerated)}
    (folder / f"{os.getpid()}.json").write_text(json.dumps(counts), encoding="utf-8")


def counted(folder: Path) -> dict[str, dict[str, int]]:
    """By class: how many objects were "constructed", and how many of them hold something "accelerated"."""
    total: dict[str, Counter[str]] = {"constructed": Counter(), "accelerated": Counter()}
    for file in folder.glob("*.json"):
        for kind, counts in json.loads(file.read_text(encoding="utf-8")).items():
            total[kind].update(counts)
    names = sorted(total["constructed"])
    return {name: {kind: counts[name] for kind, counts in total.items()} for name in names}


def _accelerate_instances(cls: type) -> None:
    import imagen_fast

    construct = cls.__init__

    @functools.wraps(construct)
    def init(self: object, *args: object, **kwargs: object) -> None:
        construct(self, *args, **kwargs)
        if type(self) is cls:
            _constructed[cls.__name__] += 1
            _accelerated[cls.__name__] += bool(imagen_fast.accelerate(self).swapped)

    cls.__init__ = init  # type: ignore[misc]


@contextlib.contextmanager
def _empty_modules(names: list[str]) -> Iterator[None]:
    """While it lasts, imports of these find modules that have every name, and nothing in it."""
    if "torchvision" in names:
        import transformers  # noqa: F401  # before, for it looks whether there is one

    class Empty(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    for name in names:
        sys.modules[name] = Empty(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def make_hub(folder: Path) -> dict[str, str]:
    """Lay `MODELS` out under `folder` as the hub's cache does; what to set in the environment to use it, offline."""
    from transformers import T5Config, T5Tokenizer

    characters = [("▁", -2.0), *((chr(code), -3.0) for code in range(33, 127))]
    tokenizer = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *characters], extra_ids=10)
    for name, config in MODELS.items():
        cache = folder / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = cache / "snapshots" / "0"
        snapshot.mkdir(parents=True)
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text("0", encoding="utf-8")
        T5Config(**config).save_pretrained(snapshot)
        tokenizer.save_pretrained(snapshot)
    return {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
