"""imagen-pytorch (lucidrains), 1.26 and 2.x: its U-Nets, `Imagen` and `ElucidatedImagen`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from imagen_pytorch.elucidated_imagen import ElucidatedImagen
from imagen_pytorch.imagen_pytorch import Imagen, Unet
from torch import Tensor, nn

from . import Integration
from ._graphed import Prepare, Prepared
from ._imagen_pytorch_blocks import BLOCKS
from ._imagen_pytorch_sampler import FusedGuidance, FusedSample, FusedThreshold
from ._packed import PackedConv2d, PackedLinear


def _parts(obj: nn.Module) -> Mapping[str, nn.Module]:
    """A cascade itself, and its U-Nets also while it keeps them in a plain list (as it does during training)."""
    if isinstance(obj, Unet):
        return {"": obj}
    return {"": obj} | {f"unets.{i}": unet for i, unet in enumerate(obj.unets) if isinstance(unet, Unet)}  # type: ignore[arg-type]


def _runs(obj: Any, inputs: Any) -> Iterator[Callable[[], object]]:
    """A cascade takes the keyword arguments of `sample`; a U-Net the arguments of one call, or synthetic ones."""
    if isinstance(inputs, Mapping):
        yield partial(obj if isinstance(obj, Unet) else obj.sample, **inputs)
    elif isinstance(inputs, tuple) and isinstance(obj, Unet):
        yield partial(obj, *inputs)
    elif inputs is None:
        for unet in _parts(obj).values():
            if isinstance(unet, Unet):
                yield partial(unet, **_synthetic_inputs(unet))
    else:
        raise TypeError(
            "verify must be True, a dict of keyword arguments (of a U-Net's call, of sample for a cascade) or, for a "
            f"U-Net, a tuple of positional arguments; got {type(inputs).__name__}"
        )


def _synthetic_inputs(unet: Unet) -> dict[str, Any]:
    """Two random pictures, the smallest that keep 4 pixels a side everywhere, with a text of 7 tokens."""
    parameter, generator = next(unet.parameters()), torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(parameter)

    size = 4 * 2 ** len(unet.downs)
    inputs: dict[str, Any] = {"x": random(2, unet.channels, size, size), "time": random(2)}
    if unet.lowres_cond:
        inputs |= {"lowres_cond_img": random(2, unet.channels, size, size), "lowres_noise_times": random(2)}
    if unet.cond_on_text:
        inputs["text_embeds"] = random(2, 7, unet.text_to_cond.in_features)
        inputs["text_mask"] = (torch.arange(7) < torch.tensor([[7], [3]])).to(parameter.device)
    if unet.has_cond_image:
        inputs["cond_images"] = random(2, unet.cond_images_channels, size, size)
    return inputs


def _converts(part: nn.Module) -> bool:
    """A call of a cascade is its loss in training, whose pictures and noise stay as they are; of samples, its U-Nets
    are called alone."""
    return isinstance(part, Unet)


def _graphed(part: nn.Module) -> Prepare | None:
    return _as_called if isinstance(part, Unet) else None


def _as_called(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], pads: bool) -> Prepared | str:
    return "imagen-pytorch's U-Nets are recorded on the CPU alone" if pads else Prepared(args, kwargs)


INTEGRATION = Integration(
    serves=(Imagen, ElucidatedImagen, Unet),
    fused=(*BLOCKS, FusedGuidance, FusedSample, FusedThreshold, PackedLinear, PackedConv2d),
    parts=_parts,
    runs=_runs,
    converts=_converts,
    graphed=_graphed,
)
