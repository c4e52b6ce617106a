"""A host library's own tests, plain and with `accelerate` applied to whatever they construct: which of them break?

    python tools/host_tests.py ~/diffusers tests/schedulers/test_scheduler_ddpm.py tests/pipelines/deepfloyd_if
    python tools/host_tests.py ~/transformers tests/models/t5 -- -k EncoderOnly

The first argument is a checkout of the library's sources, of the version that is installed; then files or folders of
tests in it, and options of pytest after `--`. Prints how the tests ended both ways and the names of those that pass
plain and do not accelerated; exits with 1 if there are any. `--json FILE` records it, `--path FOLDER` is for what the
tests import and this environment lacks.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

CLASSES = {
    "diffusers": (
        "UNet2DConditionModel",
        *("DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"),
    ),
    "transformers": (
        *("T5EncoderModel", "MT5EncoderModel", "UMT5EncoderModel"),
        *("T5Model", "T5ForConditionalGeneration", "UMT5Model", "UMT5ForConditionalGeneration"),
    ),
    "imagen_pytorch": ("Unet", "Imagen", "ElucidatedImagen"),
}
PLUGIN = Path(__file__).stem


def pytest_configure() -> None:
    """As a plugin of pytest: objects of these classes are accelerated as soon as they are constructed."""
    import imagen_fast

    def accelerated(cls: type) -> None:
        construct = cls.__init__

        @functools.wraps(construct)
        def init(self: object, *args: object, **kwargs: object) -> None:
            construct(self, *args, **kwargs)
            if type(self) is cls:
                imagen_fast.accelerate(self)

        cls.__init__ = init  # type: ignore[misc]

    for host in os.environ["IMAGEN_FAST_HOSTS"].split():
        library = importlib.import_module(host)
        for name in CLASSES[host]:
            accelerated(getattr(library, name))


def outcomes(
    checkout: Path, tests: list[str], options: list[str], host: str | None, paths: tuple[Path, ...] = ()
) -> dict[str, str]:
    """How every test ended: "passed", "failed" or "skipped"; accelerated if a host is named."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}"]
        path = [Path(__file__).parent, checkout, *paths]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(folder.resolve()) for folder in path)}
        if host is not None:
            command += ["-p", PLUGIN]
            environment |= {"IMAGEN_FAST_HOSTS": host}
        run = subprocess.run(
            [*command, *options, *tests], cwd=checkout, env=environment, capture_output=True, text=True, check=False
        )
        if not report.exists():
            raise SystemExit(f"pytest wrote no report:\n{run.stdout[-3000:]}\n{run.stderr[-3000:]}")
        found = {}
        for case in ElementTree.parse(report).iter("testcase"):
            ended = {child.tag for child in case}
            name = f"{case.get('classname')}::{case.get('name')}"
            found[name] = "failed" if ended & {"failure", "error"} else "skipped" if "skipped" in ended else "passed"
        return found


def record(host: str, tests: list[str], plain: dict[str, str], accelerated: dict[str, str]) -> dict[str, Any]:
    """What a run leaves behind: the host's version, the classes accelerated, how the tests ended, and from where."""
    from imagen_fast import provenance

    return {
        "host": host,
        "version": importlib.metadata.version(host.replace("_", "-")),
        "classes": list(CLASSES[host]),
        "tests": tests,
        "plain": dict(sorted(Counter(plain.values()).items())),
        "accelerated": dict(sorted(Counter(accelerated.values()).items())),
        "broken": broken(plain, accelerated),
        "failed_plain": sorted(name for name, ended in plain.items() if ended == "failed"),
        "provenance": dataclasses.asdict(provenance.collect()),
    }


def broken(plain: dict[str, str], accelerated: dict[str, str]) -> list[str]:
    """The tests that pass plain and do not accelerated."""
    return sorted(name for name, ended in plain.items() if ended == "passed" and accelerated.get(name) != "passed")


def main() -> int:
    arguments, _, options = " ".join(sys.argv[1:]).partition(" -- ")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("tests", nargs="+")
    parser.add_argument("--host", choices=CLASSES, help="default: the name of the checkout's folder")
    parser.add_argument("--path", type=Path, action="append", default=[], help="a folder for PYTHONPATH; repeatable")
    parser.add_argument("--json", type=Path, help="a file to record the outcome in")
    given = parser.parse_args(arguments.split())
    host = given.host or given.checkout.resolve().name.replace("-", "_")
    if host not in CLASSES:
        parser.error(f"--host is needed: {host!r} is none of {', '.join(CLASSES)}")

    plain = outcomes(given.checkout, given.tests, options.split(), None, tuple(given.path))
    accelerated = outcomes(given.checkout, given.tests, options.split(), host, tuple(given.path))
    differences = broken(plain, accelerated)
    if given.json:
        from imagen_fast.files import atomic_file

        sys.path[:0] = map(str, given.path)  # the host may stand in one of them
        found = record(host, given.tests, plain, accelerated)
        with atomic_file(given.json) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"plain:       {dict(Counter(plain.values()))}")
    print(f"accelerated: {dict(Counter(accelerated.values()))}")
    for name in differences:
        print(f"passes plain, {accelerated.get(name, 'missing')} accelerated: {name}")
    return int(bool(differences))


if __name__ == "__main__":
    raise SystemExit(main())
