"""The reference Imagen in plain PyTorch: T5 encoder, base U-Net, efficient U-Net and the cascade of them."""

from .cascade_config import ImagenConfig, StageConfig
from .efficient_unet import EfficientUNet, EfficientUNetConfig
from .imagen import Imagen
from .t5 import T5Config, T5Encoder
from .unet import UNet, UNetConfig

__all__ = [
    "EfficientUNet",
    "EfficientUNetConfig",
    "Imagen",
    "ImagenConfig",
    "StageConfig",
    "T5Config",
    "T5Encoder",
    "UNet",
    "UNetConfig",
]
