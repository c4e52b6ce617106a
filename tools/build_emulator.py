"""Builds the CUDA kernels for the host emulator (csrc/common/simt), and prints where the library is.

    python tools/build_emulator.py                   to run tests on
    python tools/build_emulator.py --flavour races   that report data races
    python tools/build_emulator.py --flavour address   that report accesses out of bounds (see `environment`)

The library implements the CUDA operators for tensors of the CPU:

    IMAGEN_FAST_CUDA_EMULATOR=$(python tools/build_emulator.py) python -m pytest tests/cuda

It is compiled for the machine that builds it, and no part of the package. Needed are a C++ compiler and ninja; no CUDA.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
SIMT = ROOT / "csrc" / "common" / "simt"

# For everything, for the kernels alone, for the linker. The emulator is not instrumented for races: it says itself what
# its functions access. What is instrumented takes longer to compile than the few tests that run on it take.
FLAVOURS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "plain": ([], [], []),
    "races": (
        ["-DIMAGEN_FAST_EMULATOR_RACES", "-O1"],
        ["-fsanitize=thread"],
        ["-ldl"],
    ),
    "address": (
        ["-fsanitize=address,alignment", "-fno-sanitize-recover=alignment", "-fno-omit-frame-pointer", "-O0"],
        [],
        ["-fsanitize=address,alignment"],
    ),
}
FLAGS = ["-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-march=native"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DIMAGEN_FAST_EMULATED", "-DIMAGEN_FAST_ISA=emulated"]


def setup_module() -> ModuleType:
    """setup.py, for how it finds the compiler and builds a library."""
    spec = importlib.util.spec_from_file_location("imagen_fast_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def build(flavour: str = "plain", sources: list[Path] | None = None, name: str = "imagen_fast_cuda_emulated") -> Path:
    """Bring a library of CUDA sources, by default all kernels of the package, up to date for the emulator."""
    native = setup_module()
    compiler = native.find_compiler()
    if compiler is None:
        raise SystemExit("imagen_fast: the emulator needs a C++ compiler")
    everything, kernels, linker = FLAVOURS[flavour]
    objects = {f"simt.{source.stem}.o": (source, [*FLAGS, *everything]) for source in sorted(SIMT.glob("*.cpp"))}
    kernel_flags = ["-x", "c++", *FLAGS, *everything, *kernels, f"-I{ROOT / 'csrc'}"]
    kernel_flags.append(f'-DIMAGEN_FAST_CUDA_LIBRARY="emulator: {flavour}"')
    if sources is None:
        import torch

        torch_folder = Path(torch.__file__).parent
        sources = sorted(native.CSRC.glob("*/cuda*.cu"))
        kernel_flags += [native.STABLE_ABI, f"-isystem{torch_folder / 'include'}"]
        linker = [*linker, f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-Wl,--as-needed"]
    objects |= {f"{source.parent.name}.{source.stem}.o": (source, kernel_flags) for source in sources}
    library = native.Library(f"lib{name}.so", compiler, compiler, objects, linker)
    return library.build(ROOT / "build" / "emulator" / name / flavour)


def environment(flavour: str) -> dict[str, str]:
    """What a process needs in its environment to load a library of this flavour."""
    if flavour != "address":
        return {}
    compiler = setup_module().find_compiler()

    def runtime(name: str) -> str:
        command = [*compiler, f"-print-file-name={name}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    # Before all others, and the C++ runtime with it: AddressSanitizer looks for its `throw` at once.
    return {
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the CUDA kernels for the host emulator.")
    parser.add_argument("--flavour", choices=FLAVOURS, default="plain")
    print(build(parser.parse_args().flavour))


if __name__ == "__main__":
    main()
