"""What only a GPU can show; `make test-gpu` runs it. Without one, `test_calls.py` alone is collected, and says so."""

from __future__ import annotations

import torch

_ON_A_DEVICE = ["test_every_op.py", "test_graphs.py", "test_large.py", "test_loops.py", "test_sampler.py"]
collect_ignore = [] if torch.cuda.is_available() else _ON_A_DEVICE
