"""Linear layers and convolutions on weights packed once, on the CPU and without gradients.

PyTorch's own layers have oneDNN bring their weight into its blocked layout at every call. Here a packed copy is kept
beside the layer (see `_kept`), and what follows a layer can be computed where its results are still in registers: an
activation, the sum with a residual. A copy is used

- on the CPU, in float32, and in 16 bits where the processor has instructions for it; convolutions in channels-last
  alone, those of 3x3 by Winograd's algorithm where that is faster (`ops._conv3x3`); linear layers in bfloat16 by this
  package's own product where that is faster (`ops._packed_linear`),
- without gradients, autocast, tracing, and modes or transforms of PyTorch that would not see the layer,
- while the layer is plain (`why_called`) and its weight is the one that was packed, unchanged (`_kept.Seen`).

On other devices some layers that read one tensor, such as the queries, keys and values of a block's own pixels, are one
product: a copy of their weights stands below each other (`Fused.joined`), under the same conditions.

Otherwise the layer does what it always did. `PackedLinear` and `PackedConv2d` are the forms that layers take under
`accelerate(inference=True)`; a fused block computes with a child by `linear`, `linears` and `conv2d`, which call
the child where it has no such form.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import _conv3x3
from ..ops import _packed_linear as _product
from ..reference.group_norm_act import ACTIVATIONS
from ._fused import Fused, own_methods, replaced, why_called
from ._kept import Seen, can_be_seen, drop, kept, outside_inference, values_kept
from ._once import once_of_graph

_ONEDNN = torch.ops.mkldnn
_FEWEST_TILES = {2: 16, 4: 32}  # for Winograd's algorithm, by the edge of their results
# Activations as oneDNN knows them: name, algorithm
_ACTIVATIONS: dict[str | None, tuple[str, str]] = {
    None: ("none", ""),
    "silu": ("swish", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
}


def is_packed_by_onednn(device: torch.device) -> bool:
    """Whether packing is oneDNN's for a layer on this device; elsewhere it is the joining of several."""
    return device.type in ("cpu", "meta")


class _Packed(NamedTuple):
    seen: Seen
    weight: Any  # a tensor, or the panels of this package's own product
    bias: Tensor | None
    is_transformed: bool = False  # for Winograd's algorithm, not for oneDNN


class PackedLinear(Fused, nn.Linear):
    """`nn.Linear` on a packed weight."""

    original = nn.Linear
    ops = ()
    packs = True

    def forward(self, input: Tensor) -> Tensor:
        packed = _packed_linear(self, (self,), input) if _computes_as_its_class(self) else None
        return super().forward(input) if packed is None else _run_linear(packed, input, None)


class PackedConv2d(Fused, nn.Conv2d):
    """`nn.Conv2d` on a packed weight."""

    original = nn.Conv2d
    ops = ()
    packs = True

    def forward(self, input: Tensor) -> Tensor:
        packed = _packed_conv2d(self, input) if _computes_as_its_class(self) else None
        return super().forward(input) if packed is None else _run_conv2d(self, packed, input, None)


# ---- For fused blocks


def linear(layer: Any, x: Tensor, *, activation: str | None = None, add: Tensor | None = None) -> Tensor:
    """`activation(layer(x))`, or `layer(x) + add`.

    Args:
        layer: a child that is an `nn.Linear` as long as nobody replaces it.
        x: (..., features).
        activation: as of `ops.group_norm_act`.
        add: of the result's shape; not together with an activation.
    """
    packed = _packed_linear(layer, (layer,), x) if isinstance(layer, PackedLinear) and _is_plain(layer) else None
    if packed is None:
        y = ACTIVATIONS[activation](layer(x))
        return y if add is None else y + add
    if add is None:
        return _run_linear(packed, x, activation)
    if _can_add(add, x, (*x.shape[:-1], layer.out_features)) and add.is_contiguous():
        return _run_linear(packed, x, None, add)
    return _run_linear(packed, x, None) + add


def linears(owner: nn.Module, layers: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, ...]:
    """`layer(x)` of several layers that read the same x: one product, whose parts are views of one result.

    Args:
        owner: the module beside which the weights are kept, one packed matrix of all of them.
        layers: children that are `nn.Linear` as long as nobody replaces them.
        x: (..., features).

    Returns:
        One (..., width) for each layer. The last dimension is dense, the others may not be.
    """
    if all(isinstance(layer, PackedLinear) and _is_plain(layer) for layer in layers):
        if is_packed_by_onednn(x.device):
            packed = _packed_linear(owner, layers, x)
            y = None if packed is None else _run_linear(packed, x, None)
        else:
            y = _joined_product(owner, layers, x)
        if y is not None:
            return y.split([layer.out_features for layer in layers], dim=-1)  # type: ignore[misc]
    return tuple(layer(x) for layer in layers)


def conv2d(layer: nn.Module, x: Tensor, *, add: Tensor | None = None, more: Tensor | None = None) -> Tensor:
    """`layer(x)`, or `layer(x) + add`, or `layer(torch.cat((x, more), dim=1))`.

    Args:
        layer: a child that is an `nn.Conv2d` as long as nobody replaces it.
        x: (B, C, H, W).
        add: of the result's shape.
        more: further channels of x; not together with `add`.
    """
    if more is not None:
        product = product_of(layer, x)
        if product is not None:
            return _run_product(product, x, None, more)
        x = torch.cat((x, more), dim=1)
    packed = _packed_conv2d(layer, x) if isinstance(layer, PackedConv2d) and _is_plain(layer) else None
    if packed is None:
        y = layer(x)
        return y if add is None else y + add
    assert isinstance(layer, PackedConv2d)
    if add is None:
        return _run_conv2d(layer, packed, x, None)
    by_onednn = not packed.is_transformed and not isinstance(packed.weight, _product.Panels)
    fits = _can_add(add, x, _conv2d_shape(layer, x)) and (by_onednn or is_channels_last(add))
    return _run_conv2d(layer, packed, x, add) if fits else _run_conv2d(layer, packed, x, None) + add


def adds_at_once(x: Tensor, dropout: nn.Module) -> bool:
    """Whether `linear` should take over the sum of the residual x and the dropout of a layer's result.

    It should where nothing stands between the two, on the CPU without gradients: the product adds while its results are
    in registers. Elsewhere the norm that follows can add in the pass that it makes over the sum anyway.
    """
    return (
        x.device.type == "cpu"
        and not dropout.training
        and why_called(dropout, nn.Dropout, ()) is None
        and values_kept()
    )


# ---- Packing


def _is_plain(layer: nn.Module) -> bool:
    return why_called(layer, layer.original) is None  # type: ignore[arg-type]


def _computes_as_its_class(layer: nn.Module) -> bool:
    """False for a layer that is wrapped, as its weights may come and go at every call (offloading); for one with a
    method of its own; and for one whose weight or bias is made anew at every call (pruned, parametrized)."""
    held, parameters = vars(layer), layer._parameters
    return (
        ("forward" not in held or "forward" in own_methods(layer))
        and replaced(layer, "_conv_forward") is None
        and "weight" in parameters
        and "bias" in parameters  # None where there is none
    )


@cache
def _has_onednn(dtype: torch.dtype) -> bool:
    if dtype == torch.float32:
        return torch.backends.mkldnn.is_available()
    if dtype == torch.bfloat16:
        return torch.backends.mkldnn.is_available() and _ONEDNN._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.backends.mkldnn.is_available() and _ONEDNN._is_mkldnn_fp16_supported()
    return False


def _kept_here(owner: nn.Module, key: Any) -> bool:
    """Whether what is kept may be used here and now; forgets it where an optimizer may follow, whose writes can be
    hidden."""
    if torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled():
        drop(owner, key)
    return values_kept()


def _can_pack(weights: Sequence[Tensor], biases: Sequence[Tensor | None], x: Tensor) -> bool:
    """Whether these can be packed, and x multiplied by them, here and now."""
    tensors = (*weights, *(bias for bias in biases if bias is not None))
    return (
        type(x) is Tensor
        and all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
        and is_packed_by_onednn(x.device)
        and x.numel() > 0
        and torch._C._get_mkldnn_enabled()
        and all(tensor.dtype == x.dtype and tensor.device == x.device for tensor in tensors)
        and can_be_seen(*tensors)
    )


def _packed_linear(owner: nn.Module, layers: Sequence[Any], x: Tensor) -> _Packed | None:
    """The packed weights of layers, one below the other; None where they cannot be used."""
    key = "packed" if len(layers) == 1 else tuple(map(id, layers))
    if not _kept_here(owner, key):
        return None
    weights = [layer._parameters.get("weight") for layer in layers]
    if any(weight is None for weight in weights):
        return None
    biases = [layer._parameters.get("bias") for layer in layers]
    fits = x.dim() >= 2 and x.shape[-1] == weights[0].shape[-1] and _has_onednn(x.dtype)
    if not fits or not _can_pack(weights, biases, x):
        return None
    found = kept(owner).get(key)
    if found is not None and found.seen.still(*weights, *biases):
        return found
    with outside_inference():
        weight = torch.cat(weights) if len(weights) > 1 else weights[0].detach()
        bias = _joined_bias(weights, biases)
        own = _product.is_faster(weight) and (bias is None or bias.is_contiguous())
        copy = _product.pack(weight) if own else _ONEDNN._reorder_linear_weight(weight)
        packed = _Packed(Seen(*weights, *biases), copy, bias)
    kept(owner)[key] = packed
    return packed


class Joined(NamedTuple):
    """Weights and biases of several layers, below each other."""

    seen: Seen
    weight: Tensor
    bias: Tensor | None


def joined(owner: nn.Module, key: Any, layers: Sequence[Any]) -> Joined:
    """Of plain layers of one width, dtype and device, whose changes can be seen; kept beside the owner."""
    weights = [layer._parameters["weight"] for layer in layers]
    biases = [layer._parameters["bias"] for layer in layers]
    found: Joined | None = kept(owner).get(key)
    if found is None or not found.seen.still(*weights, *biases):
        with outside_inference():
            found = Joined(Seen(*weights, *biases), torch.cat(weights), _joined_bias(weights, biases))
        kept(owner)[key] = found
    once = once_of_graph()
    if once is not None:  # its graph reads it where it is
        once.hold(found)
    return found


def _joined_product(owner: Any, layers: Sequence[Any], x: Tensor) -> Tensor | None:
    """All results side by side, (..., sum of the widths); None where the owner has no such copy, or may not use it."""
    key = ("joined", *map(id, layers))
    if not isinstance(owner, Fused) or key[1:] != tuple(map(id, owner.joined(owner))) or not _kept_here(owner, key):
        return None
    if any(layer._parameters.get("weight") is None or layer.in_features != x.shape[-1] for layer in layers):
        return None
    tensors = [tensor for layer in layers for tensor in layer._parameters.values() if tensor is not None]
    like_x = all(tensor.dtype == x.dtype and tensor.device == x.device for tensor in tensors)
    if type(x) is not Tensor or not like_x or not can_be_seen(*tensors):
        return None
    found = joined(owner, key, layers)
    return F.linear(x, found.weight, found.bias)


def _can_add(add: Tensor, x: Tensor, shape: tuple[int, ...]) -> bool:
    return type(add) is Tensor and add.dtype == x.dtype and add.device == x.device and add.shape == shape


def _joined_bias(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor | None:
    if all(bias is None for bias in biases):
        return None
    if len(biases) == 1:
        return biases[0]
    return torch.cat(
        [w.new_zeros(w.shape[0]) if b is None else b.detach() for w, b in zip(weights, biases, strict=True)]
    )


def _run_linear(packed: _Packed, x: Tensor, activation: str | None, add: Tensor | None = None) -> Tensor:
    if isinstance(packed.weight, _product.Panels):
        return ACTIVATIONS[activation](packed.weight.product(x, packed.bias, add))
    if add is not None:
        return _ONEDNN._linear_pointwise.binary(x, add, packed.weight, packed.bias, "add")
    name, algorithm = _ACTIVATIONS[activation]
    return _ONEDNN._linear_pointwise(x, packed.weight, packed.bias, name, [], algorithm)


def _packed_conv2d(layer: Any, x: Tensor) -> _Packed | None:
    if not _kept_here(layer, "packed"):
        return None
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    # With a packed weight oneDNN makes NHWC of NCHW; and PyTorch has another algorithm for small ones in float32.
    if weight is None or x.dim() != 4 or not (is_channels_last(x) or is_channels_last(weight)):
        return None
    fits = (
        layer.padding_mode == "zeros"
        and isinstance(layer.padding, tuple)
        and x.shape[1] == weight.shape[1] * layer.groups
        and min(_conv2d_shape(layer, x)) > 0
    )
    product = _packed_product(layer, x) if fits else None
    if product is not None:
        return product
    transforms = fits and _transforms(layer, x)
    if not fits or not (transforms or _has_onednn(x.dtype)) or not _can_pack((weight,), (bias,), x):
        return None
    key = "transformed" if transforms else "packed"
    found = kept(layer).get(key)
    if found is not None and found.seen.still(weight, bias):
        return found
    with outside_inference():
        if transforms:
            copy = _conv3x3.transformed(weight)
        else:
            where = (layer.padding, layer.stride, layer.dilation, layer.groups)
            copy = _ONEDNN._reorder_convolution_weight(weight.detach(), *where, list(x.shape))
    packed = kept(layer)[key] = _Packed(Seen(weight, bias), copy, bias, transforms)
    return packed


def product_of(layer: nn.Module, x: Tensor) -> _Packed | None:
    """The packed weight of a 1x1 convolution that is a product of rows of a channels-last x, or of its first channels.

    None where it is none, or where another way is faster.
    """
    return _packed_product(layer, x) if isinstance(layer, PackedConv2d) and _is_plain(layer) else None


def _packed_product(layer: Any, x: Tensor) -> _Packed | None:
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if (layer.kernel_size, layer.stride, layer.padding, layer.groups) != ((1, 1), (1, 1), (0, 0), 1):
        return None
    if weight is None or (bias is not None and not bias.is_contiguous()) or not _can_pack((weight,), (bias,), x):
        return None
    if not _kept_here(layer, "product"):
        return None
    found = kept(layer).get("product")
    if found is not None and found.seen.still(weight, bias):
        return found
    matrix = weight.detach().flatten(1)
    if not _product.is_faster(matrix):
        return None
    with outside_inference():
        packed = kept(layer)["product"] = _Packed(Seen(weight, bias), _product.pack(matrix), bias)
    return packed


def _run_product(packed: _Packed, x: Tensor, add: Tensor | None, more: Tensor | None = None) -> Tensor:
    """Of pictures that are channels-last, (B, C, H, W)."""
    height, width = x.shape[2:]
    pixels = [None if t is None else t.permute(0, 2, 3, 1).flatten(1, 2) for t in (x, add, more)]
    y = packed.weight.product(pixels[0], packed.bias, *pixels[1:])
    return y.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def _transforms(layer: Any, x: Tensor) -> bool:
    """Whether Winograd's algorithm computes this, and is faster: the more so the more tiles share a weight."""
    edge = _conv3x3.edge_of(x.dtype)
    tiles = x.shape[0] * -(-x.shape[2] // edge) * -(-x.shape[3] // edge)
    return tiles >= _FEWEST_TILES[edge] and _can_transform(layer, x.dtype)


def _can_transform(layer: Any, dtype: torch.dtype) -> bool:
    return (
        layer.kernel_size == (3, 3)
        and layer.stride == layer.padding == layer.dilation == (1, 1)
        and layer.groups == 1
        and (layer.bias is None or layer.bias.is_contiguous())
        and layer.in_channels % _conv3x3.CHANNEL_STEP == 0
        and layer.out_channels % _conv3x3.CHANNEL_STEP == 0
        and _conv3x3.available(dtype)
    )


def joined_bytes(layer: nn.Module, dtype: torch.dtype | None) -> int | None:
    """What its part of a copy takes that it shares with others, if it computes in dtype; None where it has none."""
    weight = layer._parameters.get("weight")
    if not isinstance(layer, nn.Linear) or weight is None or is_packed_by_onednn(weight.device):
        return None
    bias = 0 if layer.bias is None else layer.bias.numel()
    return (weight.numel() + bias) * (weight.dtype if dtype is None else dtype).itemsize


def packed_bytes(layer: nn.Module, dtype: torch.dtype | None) -> int | None:
    """The most that the packed weight of a layer takes, if it computes in dtype; None where it is not packed at all."""
    weight = layer._parameters.get("weight")
    if weight is None or not is_packed_by_onednn(weight.device):
        return None
    dtype = weight.dtype if dtype is None else dtype
    if isinstance(layer, nn.Conv2d) and _can_transform(layer, dtype):
        return _conv3x3.transformed_bytes(layer.in_channels, layer.out_channels, dtype)
    if dtype == torch.bfloat16 and (isinstance(layer, nn.Linear) or layer.kernel_size == (1, 1)):
        return _product.packed_bytes(weight.shape[0], weight.shape[1])
    return weight.numel() * dtype.itemsize


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _conv2d_shape(layer: Any, x: Tensor) -> tuple[int, ...]:
    sides = (
        (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
        for size, pad, dilation, kernel, stride in zip(
            x.shape[2:], layer.padding, layer.dilation, layer.kernel_size, layer.stride, strict=True
        )
    )
    return (x.shape[0], layer.out_channels, *sides)


def _run_conv2d(layer: nn.Conv2d, packed: _Packed, x: Tensor, add: Tensor | None) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)  # as PyTorch's own, if the weight is
    if isinstance(packed.weight, _product.Panels):
        return _run_product(packed, x, add)
    if packed.is_transformed:
        return _conv3x3.conv3x3(x, packed.weight, packed.bias, add, layer.out_channels)
    where = (layer.padding, layer.stride, layer.dilation, layer.groups)
    if add is not None:
        return _ONEDNN._convolution_pointwise.binary(
            x, add, packed.weight, packed.bias, *where, "add", 1.0, None, [], None
        )
    return _ONEDNN._convolution_pointwise(x, packed.weight, packed.bias, *where, "none", [], "")
