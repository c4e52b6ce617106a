"""The reference Imagen in plain PyTorch: text encoder, U-Nets, cascade."""
