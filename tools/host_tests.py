"""A host library's own tests, plain and with `accelerate` applied to whatever they construct: which of them break?

    python tools/host_tests.py ~/diffusers tests/schedulers/test_scheduler_ddpm.py tests/pipelines/deepfloyd_if
    python tools/host_tests.py ~/transformers tests/models/t5 -- -k EncoderOnly
    python tools/host_tests.py .venv/hosts/imagen-pytorch==2.1.0 imagen_pytorch/test --path ~/needed \\
        --empty torchvision --empty torchvision.transforms --empty torchvision.utils

The first argument is a checkout of the library's sources, or a folder that it is installed in; then files or folders of
tests in it, and options of pytest after `--`. The library is the installed one, or the one that the checkout or a
`--path` holds. Prints how the tests ended both ways and the names of those that pass plain and do not accelerated, and
exits with 1 if there are any or nothing was accelerated. The tests run without a network; `host_plugin.py` says more.
"""

from __future__ import annotations

import argparse
import dataclasses
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

import host_plugin
from host_plugin import Plan

CLASSES = {
    "diffusers": (
        *("UNet2DConditionModel", "DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"),
        *("EulerDiscreteScheduler", "IFPipeline", "IFImg2ImgPipeline", "IFInpaintingPipeline"),
        *("IFSuperResolutionPipeline", "IFImg2ImgSuperResolutionPipeline", "IFInpaintingSuperResolutionPipeline"),
    ),
    "transformers": (
        *("T5EncoderModel", "MT5EncoderModel", "UMT5EncoderModel", "T5Model", "MT5Model", "UMT5Model"),
        *("T5ForConditionalGeneration", "MT5ForConditionalGeneration", "UMT5ForConditionalGeneration"),
    ),
    "imagen_pytorch": ("Unet", "Imagen", "ElucidatedImagen"),
}


@dataclasses.dataclass
class Outcome:
    """How a run ended.

    Attributes:
        tests: by name "passed", "failed" or "skipped".
        errors: of the failed ones, the kind of exception.
        objects: by class, how many were constructed and how many of them accelerated; empty of a plain run.
    """

    tests: dict[str, str]
    errors: dict[str, str]
    objects: dict[str, dict[str, int]]

    def numbers(self) -> dict[str, int]:
        return dict(sorted(Counter(self.tests.values()).items()))


def run(given: argparse.Namespace, options: list[str], classes: list[str]) -> Outcome:
    """Run the tests in a process of their own, with `classes` accelerated."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        counts = Path(scratch) / "counts"
        counts.mkdir()
        configuration = given.checkout.resolve() / "pyproject.toml"
        if not configuration.exists():  # or pytest would look for one further up, and find that of another project
            configuration = Path(scratch) / "pytest.ini"
            configuration.write_text("[pytest]\n", encoding="utf-8")
        path = [Path(__file__).parent, given.checkout, *given.path]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(folder.resolve()) for folder in path)}
        environment |= host_plugin.make_hub(Path(scratch) / "hub")
        environment |= Plan(given.host, classes, given.empty, str(counts)).environment()
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", host_plugin.__name__]
        command += [f"--rootdir={given.checkout.resolve()}", f"--config-file={configuration}", f"--junit-xml={report}"]
        done = subprocess.run(
            [*command, *options, *given.tests],
            **{"cwd": given.checkout, "env": environment, "capture_output": True, "text": True, "check": False},
        )
        if done.returncode not in (0, 1):  # of tests that passed or failed
            raise SystemExit(f"pytest did not run the tests:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        tests, errors = {}, {}
        for case in ElementTree.parse(report).iter("testcase"):
            name = f"{case.get('classname')}::{case.get('name')}"
            bad = [child for child in case if child.tag in ("failure", "error")]
            if bad:
                errors[name] = (bad[0].get("message") or "").partition(":")[0].strip()
            ended = "failed" if bad else "skipped" if case.find("skipped") is not None else "passed"
            tests[name] = "failed" if tests.get(name) == "failed" else ended  # there may be an entry for each subtest
        return Outcome(tests, errors, host_plugin.counted(counts))


def broken(plain: Outcome, accelerated: Outcome) -> list[str]:
    """The tests that pass plain and do not accelerated."""
    return sorted(
        name for name, ended in plain.tests.items() if ended == "passed" and accelerated.tests.get(name) != "passed"
    )


def record(given: argparse.Namespace, plain: Outcome, accelerated: Outcome) -> dict[str, Any]:
    """What a run leaves behind: the host's version, how the tests ended, what was accelerated, and from where."""
    from imagen_fast import provenance

    sys.path[:0] = map(str, [given.checkout, *given.path])  # the host may stand in one of them
    version = importlib.metadata.version(given.host.replace("_", "-"))
    return {
        "host": given.host,
        "version": version,
        "tests_of": given.tests_of or version,
        "tests": given.tests,
        "plain": plain.numbers(),
        "accelerated": accelerated.numbers(),
        "objects": accelerated.objects,
        "broken": broken(plain, accelerated),
        "failed_plain": dict(sorted(plain.errors.items())),
        "provenance": dataclasses.asdict(provenance.collect()),
    }


def arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """What stands before `--`, and after."""
    own, options = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("tests", nargs="+")
    parser.add_argument("--host", help="the library as it is imported; default: by the name of the checkout's folder")
    parser.add_argument("--class", dest="classes", action="append", metavar="NAME", help="accelerated; repeatable")
    parser.add_argument("--path", type=Path, action="append", default=[], help="a folder for PYTHONPATH; repeatable")
    parser.add_argument("--empty", action="append", default=[], metavar="MODULE", help="imported empty; repeatable")
    parser.add_argument("--tests-of", metavar="VERSION", help="of the checkout, where it is not the library's")
    parser.add_argument("--json", type=Path, help="a file to record the outcome in")
    given = parser.parse_args(own)
    given.host = given.host or given.checkout.resolve().name.partition("==")[0].replace("-", "_")
    given.classes = given.classes or CLASSES.get(given.host)
    if not given.classes:
        parser.error(f"of {given.host} no class is known: --host, or --class, is one of {', '.join(CLASSES)}")
    return given, options


def main() -> int:
    given, options = arguments(sys.argv[1:])
    plain = run(given, options, [])
    accelerated = run(given, options, list(given.classes))
    differences = broken(plain, accelerated)
    if given.json:
        from imagen_fast.files import atomic_file

        found = record(given, plain, accelerated)
        with atomic_file(given.json) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"plain:       {plain.numbers()}")
    print(f"accelerated: {accelerated.numbers()}")
    for name, counts in accelerated.objects.items():
        print(f"{name}: {counts['accelerated']} of {counts['constructed']} accelerated")
    for name in differences:
        print(f"passes plain, {accelerated.tests.get(name, 'missing')} accelerated: {name}")
        print(f"    {accelerated.errors.get(name, '')}")
    if not any(counts["accelerated"] for counts in accelerated.objects.values()):
        print("nothing was accelerated")
        return 1
    return int(bool(differences))


if __name__ == "__main__":
    raise SystemExit(main())
