"""A U-Net as the sampling loop calls it: both halves of classifier-free guidance in one batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..buckets import bucket
from ..diffusion.sampling import Repeat


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a U-Net, as a function of tensors alone.

    Attributes:
        unet: a `UNet` or `EfficientUNet`.
        dtype: of what it is given.
        twice: whether its arguments are those of twice the batch, with the text and without.
    """

    unet: nn.Module
    dtype: torch.dtype
    twice: bool

    def __call__(self, inputs: dict[str, Any], sample: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            inputs: "low", the picture of low resolution beside the sample, or None; and the U-Net's "arguments".
            sample, timestep: (B, C, H, W) and (B,).

        Returns:
            The output with the text, and the one without or None.
        """
        low, arguments = inputs["low"], inputs["arguments"]
        x = sample if low is None else torch.cat((sample, low), dim=1)
        x = x.to(self.dtype)
        if not self.twice:
            return self.unet(x, timestep, **arguments), None
        both = self.unet(torch.cat((x, x)), torch.cat((timestep, timestep)), **arguments)
        conditional, unconditional = both.chunk(2)
        return conditional, unconditional


class GuidedUNet:
    """The U-Net with and without the text in one batch; without guidance, or without text in it, once.

    Where a device may repeat its steps the text is padded with tokens that the mask leaves out, so that texts of about
    a length are of one shape.

    Args:
        unet: a `UNet` or `EfficientUNet`.
        text, mask: (B, L, D) and (B, L).
        guidance: its scale; 1 needs no second evaluation.
        low, augmentation: a super-resolution U-Net's upsampled picture (B, 3, H, W) and its noise level (B,).
    """

    def __init__(
        self,
        unet: nn.Module,
        text: Tensor,
        mask: Tensor,
        guidance: float,
        *,
        low: Tensor | None = None,
        augmentation: Tensor | None = None,
    ) -> None:
        self.unet, self.low = unet, low
        self.dtype = next(unet.parameters()).dtype
        takes_text = unet.text is not None
        if takes_text and self.repeat is not None:
            padding = bucket(text.shape[1]) - text.shape[1]
            text, mask = F.pad(text, (0, 0, 0, padding)), F.pad(mask, (0, padding))
        self.once: dict[str, Tensor] = {"text": text.to(self.dtype), "text_mask": mask} if takes_text else {}
        if augmentation is not None:
            self.once["augmentation"] = augmentation
        self.twice: dict[str, Tensor] = {}
        if takes_text and guidance != 1:
            self.twice = {name: torch.cat((tensor, tensor)) for name, tensor in self.once.items()}
            self.twice["text_mask"] = torch.cat((mask, torch.zeros_like(mask)))

    def __call__(self, sample: Tensor, timestep: Tensor, guided: bool) -> tuple[Tensor, Tensor | None]:
        evaluation, inputs = self.parts(guided)
        return evaluation(inputs, sample, timestep)

    def parts(self, guided: bool) -> tuple[Evaluation, dict[str, Any]]:
        """The evaluation of a step that is guided, or not, and its inputs."""
        twice = guided and bool(self.twice)
        inputs = {"low": self.low, "arguments": self.twice if twice else self.once}
        return Evaluation(self.unet, self.dtype, twice), inputs

    @property
    def repeat(self) -> Repeat | None:
        """What repeats whole steps on the device, if the U-Net's forward has been given it (`accelerate` does)."""
        forward: Any = self.unet.forward
        return forward.repeat if getattr(forward, "repeats", False) else None
