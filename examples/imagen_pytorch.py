"""A cascade of imagen-pytorch (lucidrains), accelerated: the same pictures from the same seed.

    python examples/imagen_pytorch.py

Needs imagen-pytorch, 1.26 or 2.x. The weights are random; `imagen.load_state_dict(...)` takes the place of that.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

# This file has the name of the library, which Python would otherwise look for beside it.
sys.path[:] = [folder for folder in sys.path if Path(folder or ".").resolve() != Path(__file__).resolve().parent]

import torch  # noqa: E402
from imagen_pytorch import Imagen, Unet  # noqa: E402

import imagen_fast  # noqa: E402

TEXT_WIDTH = 64


def small_cascade() -> Imagen:
    torch.manual_seed(0)
    shared = {
        "cond_dim": 64,
        "text_embed_dim": TEXT_WIDTH,
        "attn_heads": 4,
        "attn_dim_head": 32,
        "num_resnet_blocks": 1,
    }
    base = Unet(dim=32, dim_mults=(1, 2), layer_attns=(False, True), layer_cross_attns=(False, True), **shared)
    upsampler = Unet(
        dim=32, dim_mults=(1, 2), layer_attns=False, layer_cross_attns=(False, True), memory_efficient=True, **shared
    )
    return Imagen((base, upsampler), image_sizes=(32, 64), timesteps=8, text_embed_dim=TEXT_WIDTH).eval()


def draw(imagen: Imagen, text: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Pictures (B, 3, 64, 64) in [0, 1], and the seconds they took."""
    torch.manual_seed(1)
    start = time.perf_counter()
    pictures = imagen.sample(text_embeds=text, cond_scale=3.0, use_tqdm=False)
    return pictures, time.perf_counter() - start


def main() -> None:
    imagen = small_cascade()
    text = torch.randn(2, 12, TEXT_WIDTH)  # what a T5 makes of two sentences

    plain, plain_seconds = draw(imagen, text)
    print(imagen_fast.accelerate(imagen, verify=True))
    draw(imagen, text)  # weights are packed at the first call
    fast, fast_seconds = draw(imagen, text)
    imagen_fast.restore(imagen)
    back, _ = draw(imagen, text)

    print(f"\nplain {plain_seconds:.2f} s, accelerated {fast_seconds:.2f} s: {plain_seconds / fast_seconds:.2f} times")
    print(f"largest difference between the pictures: {(plain - fast).abs().max().item():.1e}")
    print(f"restored, bit for bit the same: {torch.equal(plain, back)}")


if __name__ == "__main__":
    main()
