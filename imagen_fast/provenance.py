"""Where a result comes from: the machine, the software, the commit, the command."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from . import __version__

_LIBRARIES = ("numpy", "triton", "onnxruntime", "openvino", "diffusers", "transformers", "liger-kernel", "apex")
_CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True)
class Provenance:
    """Recorded with every result.

    Attributes:
        machine: the processor's name, or the GPU's where the work was done on one.
        cores: those this process may use.
        threads: those PyTorch uses.
        capability: the instruction set that PyTorch's kernels use here; of a GPU, its compute capability.
        memory_gib, last_level_cache_mib: sizes (0 where unknown).
        load: the one-minute load average when the run began; well above 0, others were at work too.
        system, python, torch, imagen_fast: versions; `libraries`, "name version" of others that bear on the result.
        compiler: the C++ compiler's, which torch.compile uses.
        commit: of the checkout, with `dirty` for changes that are not committed; None outside of one.
        date: UTC, ISO 8601.
        command: the command line, without directories.
        driver: of the GPU.
    """

    machine: str
    cores: int
    threads: int
    capability: str
    memory_gib: float
    last_level_cache_mib: float
    load: float
    system: str
    python: str
    torch: str
    imagen_fast: str
    compiler: str | None
    commit: str | None
    dirty: bool
    date: str
    command: str
    libraries: tuple[str, ...] = ()
    driver: str | None = None

    @property
    def slug(self) -> str:
        """The machine as part of a file name: "amd-epyc-9b45-2-threads", "nvidia-h200"."""
        name = re.sub(r"[^a-z0-9]+", "-", self.machine.lower()).strip("-")
        return name if self.driver else f"{name}-{self.threads}-threads"


def collect(device: str = "cpu") -> Provenance:
    """Everything as it is now, for work on `device`: "cpu" or "cuda"."""
    commit, dirty = _commit()
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device()) if device == "cuda" else None
    return Provenance(
        machine=gpu.name if gpu else _cpu_model(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
        threads=torch.get_num_threads(),
        capability=f"sm_{gpu.major}{gpu.minor}" if gpu else torch.backends.cpu.get_cpu_capability(),
        memory_gib=round((gpu.total_memory if gpu else _memory()) / 2**30, 1),
        last_level_cache_mib=round(last_level_cache(device) / 2**20, 1),
        load=round(os.getloadavg()[0], 2),
        system=platform.platform(terse=True),
        python=platform.python_version(),
        torch=torch.__version__,
        imagen_fast=__version__,
        compiler=_first_line(["c++", "--version"]),
        commit=commit,
        dirty=dirty,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=_command(),
        libraries=_versions(),
        driver=_driver() if gpu else None,
    )


def last_level_cache(device: str = "cpu") -> int:
    """Bytes of the largest cache of the processor, or of the GPU for "cuda"; 0 where the system does not tell."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
    return max((_bytes(path.read_text()) for path in _CPU_CACHES.glob("index*/size")), default=0)


def _bytes(size: str) -> int:
    """ "32768K" -> 33554432."""
    number, unit = re.fullmatch(r"(\d+)([KMG]?)", size.strip()).groups()  # type: ignore[union-attr]
    return int(number) << {"": 0, "K": 10, "M": 20, "G": 30}[unit]


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    name = found.group(1) if found else platform.processor() or platform.machine()
    return re.sub(r"\((R|TM)\)|@.*| CPU\b", "", name).strip()


def _driver() -> str:
    found = _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return f"driver {found}" if found else "driver unknown"


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


def _versions() -> tuple[str, ...]:
    found = []
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return tuple(found)


def _commit() -> tuple[str | None, bool]:
    """The commit of the checkout this package runs from, and whether files differ from it (results aside)."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None, False
    commit = _output(["git", "-C", str(root), "rev-parse", "HEAD"])
    status = _output(["git", "-C", str(root), "status", "--porcelain", "--", ".", ":!bench/results"])
    return commit or None, bool(status)


def _command() -> str:
    program = Path(sys.argv[0])
    name = f"python -m {__package__}" if program.name == "__main__.py" else program.name
    arguments = [Path(a).name if os.path.isabs(a) else a for a in sys.argv[1:]]
    return f"{name} {shlex.join(arguments)}".strip()


def _first_line(command: list[str]) -> str | None:
    text = _output(command)
    return text.splitlines()[0] if text else None


def _output(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
