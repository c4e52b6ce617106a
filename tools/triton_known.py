"""What is known of Triton kernels that have been compiled before, by what they were compiled from.

Of one module of Triton's first representation, one set of options, one architecture and one version of Triton the same
code comes out, and most of the minutes go into that. So the tables in `tests/triton/resources/known` say what the code
takes, by a fingerprint of all this, which takes little to make. A kernel that has changed has another fingerprint and
is compiled; so are all of them under another version of Triton.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
from kernel_resources import Resources
from triton._C.libtriton import get_cache_invalidating_env_vars, ir
from triton.compiler import make_backend

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "triton" / "resources" / "known"

Known = Mapping[str, Resources]  # by fingerprint


class Recalled(NamedTuple):
    """Stands for a compiled kernel."""

    src: Any  # as of Triton's CompiledKernel
    resources: Resources


def read(op: str) -> Known:
    """What is committed of an op."""
    file = FOLDER / f"{op}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def write(op: str, known: Known) -> None:
    """One line for each kernel."""
    lines = [f"  {json.dumps(key)}: {json.dumps(values)}" for key, values in sorted(known.items())]
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{op}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def fingerprint(src: Any, target: Any, options: Mapping[str, Any] | None) -> str:
    """Of what `triton.compile` is given."""
    backend = make_backend(target)
    parsed = backend.parse_options(dict(options or {}, **src.parse_options()))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    codegen, modules = backend.get_codegen_implementation(parsed), backend.get_module_map()
    module = src.make_ir(target, parsed, codegen, modules, context)
    settings = {**parsed.__dict__, **get_cache_invalidating_env_vars()}
    settings["extern_libs"] = [(name, Path(path).name) for name, path in settings.get("extern_libs") or ()]
    parts = (module.str_nodebug(), str(target), str(sorted(settings.items())), triton.__version__)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@contextlib.contextmanager
def recalled(known: Known, but: str | None = None) -> Iterator[None]:
    """Triton compiles what is not known, and for the architecture `but` everything, to kernels with a `fingerprint`."""
    compile_it = triton.compiler.compile

    def compile_or_recall(src: Any, target: Any = None, options: Any = None, **more: Any) -> Any:
        key = fingerprint(src, target, options)
        if key in known and name_of(target) != but:
            return Recalled(src, known[key])
        kernel = compile_it(src, target=target, options=options, **more)
        kernel.fingerprint = key
        return kernel

    with mock.patch.object(triton.compiler, "compile", compile_or_recall):
        yield


def name_of(target: Any) -> str:
    """The architecture of a target, as "9.0" or "gfx942"."""
    return target.arch if target.backend == "hip" else f"{target.arch // 10}.{target.arch % 10}"
