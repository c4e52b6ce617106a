"""What this machine and installation offer: `imagen-fast env`, and the provenance of a bug report."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

# Distributions that the package uses, accelerates or is compared with. Only looked up, never imported.
LIBRARIES = (
    "triton",
    "transformers",
    "diffusers",
    "imagen-pytorch",
    "liger-kernel",
    "kernels",
    "peft",
    "accelerate",
    "onnx",
    "onnxruntime",
    "openvino",
    "tokenizers",
    "sentencepiece",
    "safetensors",
    "numpy",
    "pillow",
    "fonttools",
    "matplotlib",
)


def collect() -> dict[str, dict[str, Any]]:
    """Sections of facts, ready for JSON.

    `machine`, `versions`, `libraries` (None: not installed), `backends` (None: available, else the reason why not),
    `ops` (the backends that each op has), and `settings` (the environment variables that are set).
    """
    return {
        "machine": _machine(),
        "versions": _versions(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "backends": _backends(),
        "ops": _ops(),
        "settings": {name: value for name, value in sorted(os.environ.items()) if name.startswith("IMAGEN_FAST_")},
    }


def to_json(found: dict[str, dict[str, Any]]) -> str:
    """`collect()`'s result as JSON."""
    return json.dumps(found, indent=2, ensure_ascii=False)


def to_table(found: dict[str, dict[str, Any]]) -> str:
    """`collect()`'s result for reading."""
    from tabulate import tabulate

    missing = [name for name, version in found["libraries"].items() if version is None]
    shown = {
        **found,
        "libraries": {name: version for name, version in found["libraries"].items() if version is not None},
        "backends": {
            name: "available" if reason is None else f"no: {reason}" for name, reason in found["backends"].items()
        },
    }
    if missing:
        shown["libraries"]["not installed"] = ", ".join(missing)
    width = max(len(name) for section in shown.values() for name in section)
    return "\n\n".join(
        f"{title}\n" + tabulate([(f"  {name:<{width}}", _text(value)) for name, value in rows.items()], **_PLAIN)
        for title, rows in shown.items()
        if rows
    )


_PLAIN: dict[str, Any] = {"tablefmt": "plain", "disable_numparse": True, "preserve_whitespace": True}


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _machine() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "system": platform.platform(),
        "processor": cpu_model(),
        "cores": _usable_cores(),
        "memory": _memory(),
        "instruction set": _cpu_capability(),
        "GPU": gpus or "none",
    }


def _versions() -> dict[str, str]:
    import torch

    return {
        "imagen-fast": _version("imagen-fast") or "not installed",
        "Python": f"{platform.python_version()} ({sys.executable})",
        "PyTorch": torch.__version__,
        "PyTorch threads": str(torch.get_num_threads()),
        "CUDA of PyTorch": torch.version.cuda or "none",
        "C++ compiler": _compiler(),
        "nvcc": _tool_version("nvcc") or "none",
    }


def _backends() -> dict[str, str | None]:
    import torch

    from . import backends

    found = {name: backends.unavailable_reason(name) for name in backends.NAMES}
    if not torch.cuda.is_available():
        for name in set(backends.PREFERENCE["cuda"]) - set(backends.PREFERENCE["cpu"]):
            found[name] = found[name] or "PyTorch finds no GPU"
    return found


def _ops() -> dict[str, list[str]]:
    from . import backends, ops

    return {name: list(backends._OPS[name].backends) for name in ops.__all__}


def cpu_model() -> str:
    """The processor's name, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _usable_cores() -> str:
    count = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else count
    return str(count) if usable == count else f"{usable} of {count}"


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
    except (AttributeError, ValueError, OSError):
        return "unknown"


def _cpu_capability() -> str:
    """What the kernels use; without them, what PyTorch uses."""
    import torch

    from . import _native

    if _native.unavailable_reason() is None:
        return _native.cpu_capability()
    return f"{torch.backends.cpu.get_cpu_capability()} (PyTorch's; the kernels are not built)"


def _compiler() -> str:
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next(filter(None, (_tool_version(name) for name in names if name)), "none")


def _tool_version(name: str) -> str | None:
    """The most telling line of `name --version`, or None if there is no such program."""
    path = shutil.which(name)
    if path is None:
        return None
    try:
        output = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return path
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    line = next((line for line in lines if "release" in line), lines[0] if lines else "")
    return f"{line} ({path})"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
