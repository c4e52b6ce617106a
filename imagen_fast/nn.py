"""The ops as modules, with the parameters and `state_dict` of the PyTorch modules that they replace."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import ops
from .ops._checks import integer, not_negative, one_of
from .reference.group_norm_act import ACTIVATIONS


class GroupNormAct(nn.Module):
    """`nn.GroupNorm`, an optional scale and shift, and an activation in one: `ops.group_norm_act` as a module.

    Its parameters are those of `nn.GroupNorm(num_groups, num_channels, eps, affine)`, in the `state_dict` too.

    Args:
        num_groups: the number of groups; it divides `num_channels`.
        num_channels: C of the input (B, C, positions...).
        activation: "silu", "gelu", "gelu_tanh" or None.
        eps: added to the variance.
        affine: whether there are a weight and a bias, (C,) each.

    Example:
        >>> norm = imagen_fast.nn.GroupNormAct(32, 128)
        >>> h = norm(x, scale, shift)  # x (B, 128, H, W); scale and shift (B, 128), each optional
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        activation: str | None = "silu",
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_groups = integer("num_groups", num_groups, minimum=1)
        num_channels = integer("num_channels", num_channels, minimum=1)
        if num_channels % num_groups:
            raise ValueError(f"num_groups must divide num_channels = {num_channels}, got {num_groups}")
        one_of("activation", activation, tuple(ACTIVATIONS))
        self.num_groups = num_groups
        self.num_channels = num_channels
        self.activation = activation
        self.eps = not_negative("eps", eps)
        self.affine = affine
        if affine:
            self.weight = nn.Parameter(torch.empty(num_channels, device=device, dtype=dtype))
            self.bias = nn.Parameter(torch.empty(num_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)
        self.reset_parameters()

    @classmethod
    def from_group_norm(cls, norm: nn.GroupNorm, activation: str | None = "silu") -> GroupNormAct:
        """A module that shares the parameters of `norm` (the same tensors, not copies) and its training mode."""
        if not isinstance(norm, nn.GroupNorm):
            raise TypeError(f"norm must be an nn.GroupNorm, got {type(norm).__name__}")
        module = cls(norm.num_groups, norm.num_channels, activation, norm.eps, norm.affine, device="meta")
        module.weight, module.bias = norm.weight, norm.bias
        return module.train(norm.training)

    def reset_parameters(self) -> None:
        """Weights of 1 and biases of 0."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """x (B, C, positions...); scale and shift (B, C), or broadcastable to it, each optional."""
        return ops.group_norm_act(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            scale=scale,
            shift=shift,
            activation=self.activation,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.num_groups}, {self.num_channels}, activation={self.activation!r}, eps={self.eps}, "
            f"affine={self.affine}"
        )


class ChannelRMSNormAct(nn.Module):
    """RMS normalisation over channels, an optional scale and shift, and an activation: `ops.channel_rms_norm_act`.

    Its parameter is imagen-pytorch's `ChanRMSNorm.gamma`, but (num_channels,), and named `weight`.

    Args:
        num_channels: C of the input (B, C, positions...).
        activation: "silu", "gelu", "gelu_tanh" or None.

    Example:
        >>> norm = imagen_fast.nn.ChannelRMSNormAct(128)
        >>> h = norm(x, scale, shift)  # x (B, 128, H, W); scale and shift (B, 128), each optional
    """

    def __init__(
        self,
        num_channels: int,
        activation: str | None = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_channels = integer("num_channels", num_channels, minimum=1)
        one_of("activation", activation, tuple(ACTIVATIONS))
        self.num_channels = num_channels
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(num_channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights of 1."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """x (B, C, positions...); scale and shift (B, C), or broadcastable to it, each optional."""
        return ops.channel_rms_norm_act(x, self.weight, scale=scale, shift=shift, activation=self.activation)

    def extra_repr(self) -> str:
        return f"{self.num_channels}, activation={self.activation!r}"


class AddRMSNorm(nn.Module):
    """T5's layer norm, of a sum if a residual is given: `ops.rms_norm`. (`torch.nn.RMSNorm` takes no residual.)

    Its parameter is that of transformers' `T5LayerNorm`, in the `state_dict` too.

    Args:
        channels: the last size of the input.
        eps: added to the mean square.

    Example:
        >>> norm = imagen_fast.nn.AddRMSNorm(768)
        >>> y = norm(x)  # x (..., 768)
        >>> y, x = norm(attention(y), x)  # x = x + attention(y); y = norm(x)
    """

    def __init__(
        self,
        channels: int,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        channels = integer("channels", channels, minimum=1)
        self.channels = channels
        self.eps = not_negative("eps", eps)
        self.weight = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights of 1."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of x (..., channels); with a residual like x, that of their sum, and the sum.

        Under autocast a residual of another dtype than x's, as a residual stream is there, widens both.
        """
        return ops.rms_norm(x, self.weight, residual=residual, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}"


class GatedGELU(nn.Module):
    """`gelu(gate) * value`, of two tensors or of the halves of one: `ops.gated_gelu`. It has no parameters.

    Args:
        approximate: "tanh", as T5 has it, or "none" for the exact GELU.

    Example:
        >>> ffn = nn.Sequential(nn.Linear(768, 2 * 2048, bias=False), GatedGELU(), nn.Linear(2048, 768, bias=False))
    """

    def __init__(self, approximate: str = "tanh") -> None:
        super().__init__()
        one_of("approximate", approximate, ("tanh", "none"))
        self.approximate = approximate

    def forward(self, gate: Tensor, value: Tensor | None = None) -> Tensor:
        """gate and value (..., D) each, or gate alone (..., 2 D)."""
        return ops.gated_gelu(gate, value, self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"
