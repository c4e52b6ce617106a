"""What only a GPU can show; `make test-gpu` runs it. Without one, `test_calls.py` alone is collected, and says so."""

from __future__ import annotations

import torch

_ON_A_DEVICE = [f"test_{name}.py" for name in ("every_op", "graphs", "joined", "large", "loops", "sampler")]
collect_ignore = [] if torch.cuda.is_available() else _ON_A_DEVICE
