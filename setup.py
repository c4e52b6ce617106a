"""Builds the native libraries beside the Python package; everything else about packaging is in pyproject.toml.

`csrc/` is laid out by op, and no file lists the sources:

- `csrc/<folder>/cpu_kernel*.cpp` holds kernels. Each is compiled once per instruction set, without a torch header.
- every other `csrc/<folder>/*.cpp` is compiled once: registration, and what must not depend on an instruction set.

All of it becomes `imagen_fast/lib/libimagen_fast_cpu.so` on PyTorch's stable ABI: one file for every Python and every
torch from 2.11 on. Without a C++ compiler the package installs all the same and runs on plain PyTorch.

- `csrc/<folder>/cuda*.cu`, where nvcc is, become `imagen_fast/lib/libimagen_fast_cuda.so`, each compiled once for all
  architectures. Neither a GPU nor a PyTorch with CUDA is needed. `IMAGEN_FAST_CUDA_ARCHS="9.0 12.0+PTX"` chooses the
  architectures, `IMAGEN_FAST_NO_CUDA=1` leaves the library out.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
LIBRARY_FOLDER = Path("imagen_fast") / "lib"
PACKAGE_FOLDERS = {"imagen_fast.kernels": "kernels/triton", "imagen_fast.bench": "bench"}

# PyTorch 2.11: the oldest version whose stable ABI the sources use
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"
# No contraction: which a * b + c become one instruction would depend on what is inlined where, and bits with it. The
# kernels ask for fused operations by name.
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
# The last two: false alarms inside GCC 12's own AVX-512 header
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
INSTRUCTION_SETS = {"default": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}

# PTX: for architectures to come.
CUDA_ARCHITECTURES = "8.0 9.0 10.0 12.0+PTX"


def say(message: str) -> None:
    print(f"imagen_fast: {message}", file=sys.stderr, flush=True)


def find_compiler() -> list[str] | None:
    """The C++ compiler's command: $CXX, or the first usual one on the path."""
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        if not shutil.which(command[0]):
            raise SystemExit(f"imagen_fast: the C++ compiler that CXX names is not there: {os.environ['CXX']}")
        return command
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def find_ninja() -> str:
    """This environment's, whatever the path says: two versions do not read each other's logs, and would build anew."""
    if found := shutil.which("ninja", path=str(Path(sys.executable).parent)) or shutil.which("ninja"):
        return found
    import ninja  # the package of that name, which build isolation installs

    return str(Path(ninja.BIN_DIR) / "ninja")


@dataclass
class Library:
    """A shared library, its sources, and what it takes to make an object of each and to link them."""

    name: str
    compiler: list[str]
    linker: list[str]
    objects: dict[str, tuple[Path, list[str]]]  # object file: source, flags
    link_flags: list[str]
    keep_log: bool = False  # what the compiler says of an object goes to a file beside it, ….o.log

    def ninja(self, folder: Path) -> str:
        """The contents of build.ninja in `folder`. Files of the checkout are named from there, so that a copy of the
        checkout has nothing to build."""

        def near(part: str) -> str:
            before, slash, rest = part.partition(str(ROOT))
            return before + os.path.relpath(slash + rest, folder) if slash else part

        def words(parts: list[str]) -> str:
            return shlex.join(map(near, parts)).replace("$", "$$")

        def path(value: Path | str) -> str:
            return near(str(value)).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

        log = " > $out.log 2>&1 || (cat $out.log; false)" if self.keep_log else ""
        lines = [
            "ninja_required_version = 1.5",
            f"cxx = {words(self.compiler)}",
            f"ld = {words(self.linker)}",
            "rule compile",
            f"  command = $cxx -MMD -MF $out.d $flags -c $in -o $out{log}",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $out",
            "rule link",
            "  command = $ld -shared $in -o $out $flags",
            "  description = link $out",
        ]
        for target, (source, flags) in self.objects.items():
            lines += [f"build {path(target)}: compile {path(source)}", f"  flags = {words(flags)}"]
        lines += [
            f"build {path(self.name)}: link {' '.join(path(target) for target in self.objects)}",
            f"  flags = {words(self.link_flags)}",
        ]
        return "\n".join(lines) + "\n"

    def build(self, folder: Path) -> Path:
        """Bring `folder`/`name` up to date."""
        folder.mkdir(parents=True, exist_ok=True)
        script = folder / "build.ninja"
        # An unchanged script keeps its time, so that a second call has nothing to do.
        if not script.exists() or script.read_text() != self.ninja(folder):
            script.write_text(self.ninja(folder))
        if subprocess.run([find_ninja(), "-C", str(folder)], stdout=2).returncode:
            raise SystemExit(f"imagen_fast: {self.name} could not be built; the compiler's messages are above")
        return folder / self.name


def understands(compiler: list[str], flags: list[str]) -> bool:
    command = [*compiler, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def cpu_library(compiler: list[str]) -> Library:
    import torch

    torch_folder = Path(torch.__file__).parent
    instruction_sets = {name: flags for name, flags in INSTRUCTION_SETS.items() if understands(compiler, flags)}
    if "default" not in instruction_sets:
        raise SystemExit(f"imagen_fast: the C++ compiler does not work: {shlex.join(compiler)}")
    for name in INSTRUCTION_SETS.keys() - instruction_sets.keys():
        say(f"{compiler[0]} does not know the flags for {name}; that machine code is left out")

    common = [*CXX_FLAGS, *WARNINGS]
    # The kernels see no torch header: an inline function of one, compiled for AVX-512, could be the copy that the
    # linker keeps for all.
    for_torch = [STABLE_ABI, f"-isystem{torch_folder / 'include'}"]
    for_torch += [f"-DIMAGEN_FAST_HAS_{name.upper()}" for name in instruction_sets if name != "default"]
    objects: dict[str, tuple[Path, list[str]]] = {}
    for source in sorted(CSRC.glob("*/*.cpp")):
        stem = f"{source.parent.name}.{source.stem}"
        if source.name.startswith("cpu_kernel"):
            for name, flags in instruction_sets.items():
                objects[f"{stem}.{name}.o"] = (source, [*common, *flags, f"-DIMAGEN_FAST_ISA=isa_{name}"])
        else:
            objects[f"{stem}.o"] = (source, [*common, *for_torch])
    # -z defs: a symbol that no library defines fails here, not at the user's import.
    link_flags = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-Wl,-z,defs", "-Wl,--as-needed"]
    return Library("libimagen_fast_cpu.so", compiler, compiler, objects, link_flags)


@dataclass
class Toolkit:
    """A CUDA toolkit: its compiler, the folder of its libraries, and the architectures it knows ("80", "90", …)."""

    nvcc: Path
    libraries: Path
    architectures: set[str]


def find_toolkit() -> Toolkit | None:
    """The CUDA toolkit of $CUDA_HOME, of the path or in the usual place."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes] if homes else []
    if not homes:
        candidates = [Path(shutil.which("nvcc") or "nvcc"), Path("/usr/local/cuda/bin/nvcc")]
    nvcc = next((path for path in candidates if path.exists()), None)
    if nvcc is None:
        return None

    def answer(*options: str) -> str:
        run = subprocess.run([str(nvcc), *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return run.stdout

    # What the path has may be a script that calls nvcc. TOP is where the real one has its toolkit.
    top = re.search(r"^#\$ TOP=(.+)$", answer("--dryrun", "-x", "cu", os.devnull), re.MULTILINE)
    home = Path(top[1].strip()).resolve() if top else nvcc.resolve().parents[1]
    folders = [home / name for name in ("lib64", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib", "lib")]
    libraries = next((folder for folder in folders if (folder / "libcudart_static.a").exists()), None)
    if libraries is None:
        say(f"{nvcc} has no libcudart_static.a in {home}; it is not used")
        return None
    return Toolkit(nvcc, libraries, set(re.findall(r"compute_(\d+)", answer("--list-gpu-arch"))))


def cuda_architectures(toolkit: Toolkit) -> list[str]:
    """The architectures to compile for, as "9.0a" or "12.0+PTX"."""
    asked = os.environ.get("IMAGEN_FAST_CUDA_ARCHS", "").replace(";", " ").replace(",", " ").split()
    for name in asked:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            raise SystemExit(
                f"imagen_fast: IMAGEN_FAST_CUDA_ARCHS: {name!r} is no architecture such as 9.0a or 12.0+PTX"
            )
    known, unknown = [], []
    for name in asked or CUDA_ARCHITECTURES.split():
        (known if re.sub(r"\D", "", name.partition("+")[0]) in toolkit.architectures else unknown).append(name)
    if unknown:
        message = f"{toolkit.nvcc} does not know the architectures {', '.join(unknown)}"
        if asked or not known:
            raise SystemExit(f"imagen_fast: {message}; name others in IMAGEN_FAST_CUDA_ARCHS")
        say(f"{message}; their machine code is left out")
    return known


def gencode(architecture: str) -> list[str]:
    """Machine code for 10.0 and later comes from the PTX of 9.0, which has all that the kernels use.

    One PTX for all of them saves time, and their own, which nvcc unrolls more, takes three times as long to compile. A
    suffix (9.0a, 10.0a) asks for an architecture's own, with the instructions that only it has.
    """
    name, _, ptx = architecture.partition("+")
    number = name.replace(".", "")
    virtual = "90" if re.fullmatch(r"1\d\d", number) else number
    code = f"sm_{number}" if not ptx else f"[sm_{number},compute_{virtual}]"
    return ["-gencode", f"arch=compute_{virtual},code={code}"]


def cuda_library(compiler: list[str], toolkit: Toolkit) -> Library:
    import torch

    torch_folder = Path(torch.__file__).parent
    architectures = cuda_architectures(toolkit)
    nvcc = [str(toolkit.nvcc), "-ccbin", shutil.which(compiler[0]) or compiler[0]]
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", STABLE_ABI, "-DUSE_CUDA"]
    flags += ["-isystem", str(torch_folder / "include"), "-Xptxas", "-v"]
    if understands(nvcc, ["--compress-mode=size"]):
        flags.append("--compress-mode=size")
    flags += [flag for architecture in architectures for flag in gencode(architecture)]
    about = f'-DIMAGEN_FAST_CUDA_LIBRARY="CUDA {" ".join(architectures)}"'
    objects = {
        f"{source.parent.name}.{source.stem}.o": (
            source,
            [*flags, *([about] if source.parent.name == "common" else [])],
        )
        for source in sorted(CSRC.glob("*/cuda*.cu"))
    }
    # CUDA's runtime comes along, without its names. libtorch.so, though nothing of it is used, is what leads to
    # libtorch_cuda.so where PyTorch has CUDA; where it has not, the one function wanted from there stays null.
    link_flags = [f"-L{torch_folder / 'lib'}", f"-L{toolkit.libraries}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
    link_flags += ["-Wl,--as-needed", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
    link_flags += ["-Wl,--exclude-libs,ALL", "-Wl,-z,defs"]
    return Library("libimagen_fast_cuda.so", nvcc, compiler, objects, link_flags, keep_log=True)  # of resources


def libraries() -> list[Library]:
    """What this machine can build."""
    if sys.platform != "linux":
        say(f"no native library for {sys.platform}; the package will run on plain PyTorch")
        return []
    compiler = find_compiler()
    if compiler is None:
        say("NO C++ COMPILER FOUND: installing without the native library; the package will run on plain PyTorch")
        say("install g++ or clang++ (or set CXX) and install again to get the kernels")
        return []
    found = [cpu_library(compiler)]
    if os.environ.get("IMAGEN_FAST_NO_CUDA", "").strip().lower() not in ("", "0", "false", "no", "off"):
        say("IMAGEN_FAST_NO_CUDA is set: building without the CUDA kernels")
    elif (toolkit := find_toolkit()) is None:
        say("no nvcc found: building without the CUDA kernels (set CUDA_HOME if there is one)")
    else:
        say(f"building the CUDA kernels with {toolkit.nvcc} (IMAGEN_FAST_NO_CUDA=1 leaves them out)")
        found.append(cuda_library(compiler, toolkit))
    return found


class BuildNative(build_ext):
    """Builds the libraries with ninja, in build/native, and copies them where the package looks for them."""

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        target = (ROOT if in_place else Path(self.build_lib)) / LIBRARY_FOLDER
        self.built: list[str] = []
        to_build = libraries()
        for left_over in set(target.glob("libimagen_fast_*.so")) - {target / library.name for library in to_build}:
            left_over.unlink()  # by an earlier build, of sources that are no more
        for library in to_build:
            made = library.build(ROOT / "build" / "native" / library.name.removesuffix(".so"))
            target.mkdir(parents=True, exist_ok=True)
            # Replaced in one step: a process that has the old file mapped keeps it whole.
            shutil.copy2(made, target / f".{library.name}")
            os.replace(target / f".{library.name}", target / library.name)
            self.built.append(str(target / library.name))

    def get_outputs(self) -> list[str]:
        return getattr(self, "built", [])

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return [str(file.relative_to(ROOT)) for file in sorted(CSRC.rglob("*")) if file.is_file()]


class PlatformWheel(bdist_wheel):
    """Tags the wheel py3-none-PLATFORM: the library uses no CPython symbol."""

    def run(self) -> None:
        # A module that has been deleted since an earlier build must not come along.
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def packages() -> list[str]:
    found = find_packages(str(ROOT), include=["imagen_fast", "imagen_fast.*"])
    for name, folder in PACKAGE_FOLDERS.items():
        if (ROOT / folder / "__init__.py").exists():
            found += [name, *(f"{name}.{sub}" for sub in find_packages(str(ROOT / folder)))]
    return found


def main() -> None:
    setup(
        packages=packages(),
        package_dir=PACKAGE_FOLDERS,
        package_data={
            "imagen_fast": [
                "py.typed",
                "assets/labels/*.png",
                "training/configs/*.toml",
                "models/weights/**/*.safetensors",
            ]
            + [f"models/weights/**/*.{ending}" for ending in ("json", "md")],
            "imagen_fast.kernels": ["*.json"],
        },
        include_package_data=False,
        # The name is only a reason for setuptools to run build_ext; the sources are found by `cpu_library`.
        ext_modules=[Extension("imagen_fast.lib.native", sources=[])],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
    )


if __name__ == "__main__":  # the tests build with what is above
    main()
