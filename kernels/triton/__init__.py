"""Triton kernels, one file per op. Installed as `imagen_fast.kernels`."""
