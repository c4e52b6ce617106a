"""Each op in plain PyTorch: the truth for tests (in float64), the `eager` backend, and the baseline of benchmarks.

`reference/<op>.py` defines the function `<op>`, with the arguments of the public op.
"""
