"""Sizes of a T5 encoder, under the names that Hugging Face's config.json uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ...config import from_dict
from ...errors import CheckpointError, ConfigError

# Hugging Face's name of a feed-forward activation -> the function; "gated-" before it adds the second projection.
ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu")


@dataclass(frozen=True)
class T5Config:
    """Sizes of a `T5Encoder`; the defaults are those of T5 v1.1 (Raffel et al., arXiv:1910.10683; Shazeer,
    arXiv:2002.05202).

    Args:
        vocab_size: number of tokens, special ones included.
        d_model: channels of the hidden states.
        d_kv: channels of a head.
        d_ff: channels inside the feed-forward part.
        num_layers: number of blocks.
        num_heads: heads per block; `num_heads * d_kv` need not be `d_model`.
        relative_attention_num_buckets: rows of the relative position table, half of them for each direction.
        relative_attention_max_distance: tokens farther apart than this share a bucket.
        bias_per_layer: a position table in every block (umT5) instead of one shared table in the first (T5, mT5, ByT5).
        feed_forward_proj: "relu" (original T5), "gated-gelu" (v1.1 and later; the tanh form of GELU), or another of
            `ACTIVATIONS`, with or without "gated-".
        layer_norm_epsilon: added to the mean square in the norms.
        dropout_rate: used in training mode alone.
        pad_token_id: the token that fills short sentences.
        eos_token_id: the token that ends each sentence.

    Raises:
        ValueError: a size is not positive, or `feed_forward_proj` is unknown.

    Example:
        >>> T5Config.preset("xxl").d_model
        4096
    """

    vocab_size: int = 32128
    d_model: int = 768
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 12
    num_heads: int = 12
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    bias_per_layer: bool = False
    feed_forward_proj: str = "gated-gelu"
    layer_norm_epsilon: float = 1e-6
    dropout_rate: float = 0.1
    pad_token_id: int = 0
    eos_token_id: int = 1

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or buckets % 2:
            raise ValueError(f"relative_attention_num_buckets must be even and at least 4, got {buckets}")
        if distance <= buckets // 4:
            raise ValueError(f"relative_attention_max_distance must be above {buckets // 4}, got {distance}")
        if self.activation not in ACTIVATIONS:
            known = ", ".join(f"{name}, gated-{name}" for name in ACTIVATIONS)
            raise ValueError(f"feed_forward_proj must be one of {known}; got {self.feed_forward_proj!r}")
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"dropout_rate must lie in [0, 1), got {self.dropout_rate}")
        for name in ("pad_token_id", "eos_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(f"{name} must lie in [0, {self.vocab_size}), got {getattr(self, name)}")

    @property
    def inner_dim(self) -> int:
        """Channels of all heads together."""
        return self.num_heads * self.d_kv

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward part multiplies its activation by a second projection."""
        return self.feed_forward_proj.startswith("gated-")

    @property
    def activation(self) -> str:
        """The activation's name without "gated-"; Hugging Face's "gated-gelu" means the tanh form, "gelu_new"."""
        if self.feed_forward_proj == "gated-gelu":
            return "gelu_new"
        return self.feed_forward_proj.removeprefix("gated-")

    @classmethod
    def preset(cls, name: str) -> T5Config:
        """A named size: "small", "base", "large", "xl", "xxl" (T5 v1.1), or "tiny_bytes" (byte vocabulary, 3 M)."""
        if name not in _PRESETS:
            raise ConfigError(f"unknown T5 preset {name!r}; known: {', '.join(_PRESETS)}")
        return cls(**_PRESETS[name])

    @classmethod
    def from_huggingface(cls, values: Mapping[str, Any], where: str = "config.json") -> T5Config:
        """Read what Hugging Face's config.json says of the encoder; keys about anything else are passed over.

        Raises:
            CheckpointError: `model_type` is not of the T5 family, or a size is missing or cannot be used.
        """
        model_type = values.get("model_type")
        if model_type not in _HUGGINGFACE_DEFAULTS:
            known = ", ".join(map(repr, _HUGGINGFACE_DEFAULTS))
            raise CheckpointError(f"{where}: model_type {model_type!r} is not a T5 encoder; known: {known}")
        missing = [name for name in _REQUIRED if name not in values]
        if missing:
            raise CheckpointError(f"{where}: missing key {', '.join(map(repr, missing))}")
        known_values = {name: values[name] for name in _FROM_HUGGINGFACE if values.get(name) is not None}
        eos = known_values.get("eos_token_id")
        if isinstance(eos, list) and eos:
            known_values["eos_token_id"] = eos[0]
        try:
            return from_dict(cls, {**_HUGGINGFACE_DEFAULTS[model_type], **known_values}, where)
        except ConfigError as error:
            raise CheckpointError(str(error)) from error

    def to_huggingface(self) -> dict[str, Any]:
        """The config.json under which Hugging Face's `T5EncoderModel` or `UMT5EncoderModel` is the same encoder."""
        values = asdict(self)
        umt5 = values.pop("bias_per_layer")
        return {
            "architectures": ["UMT5EncoderModel" if umt5 else "T5EncoderModel"],
            "model_type": "umt5" if umt5 else "t5",
            "is_encoder_decoder": False,
            "use_cache": False,
            **values,
        }


_REQUIRED = ("vocab_size", "d_model", "d_ff", "num_layers", "num_heads")
_FROM_HUGGINGFACE = tuple(name for name in T5Config.__dataclass_fields__ if name != "bias_per_layer")

# What a missing key means depends on the model type. mT5 and ByT5 compute what T5 v1.1 computes.
_HUGGINGFACE_DEFAULTS: dict[str, dict[str, Any]] = {
    "t5": {"feed_forward_proj": "relu"},
    "mt5": {},
    "umt5": {"bias_per_layer": True},
}

MODEL_TYPES = tuple(_HUGGINGFACE_DEFAULTS)

_PRESETS: dict[str, dict[str, Any]] = {
    "tiny_bytes": {"vocab_size": 384, "d_model": 256, "d_ff": 512, "num_layers": 4, "num_heads": 4},
    "small": {"d_model": 512, "d_ff": 1024, "num_layers": 8, "num_heads": 6},
    "base": {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
    "large": {"d_model": 1024, "d_ff": 2816, "num_layers": 24, "num_heads": 16},
    "xl": {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32},
    "xxl": {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
}
