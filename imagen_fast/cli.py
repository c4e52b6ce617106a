"""The command line `imagen-fast …`: parses, calls the library, prints.

Each command imports what it needs when it runs, so that `imagen-fast --help` answers at once. A mistake of the user is
one line on stderr and exit status 2; whatever else goes wrong keeps its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

USER_MISTAKE = 2
INTERRUPTED = 128 + 2  # what shells give a command that SIGINT ended
BROKEN_PIPE = 128 + 13  # and SIGPIPE

# The module that is missing, and the extra of the package that brings it.
EXTRAS = {
    "fontTools": "train",
    "matplotlib": "bench",
    "pytest_benchmark": "bench",
    "sentencepiece": "text",
    "tokenizers": "text",
    "triton": "triton",
}


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, as every other mistake is reported."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_MISTAKE, f"imagen-fast: error: {_one_line(message)} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `imagen-fast` with the arguments `argv` (by default the process's) and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        with _plain_messages():
            args = _parser(arguments).parse_args(arguments)
            return args.run(args) or 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (ValueError, OSError, ModuleNotFoundError) as error:
        message = _explained(error)
        if debug or message is None:
            raise
        print(f"imagen-fast: error: {message}", file=sys.stderr)
        return USER_MISTAKE


# ---- Commands: each has a function that adds its arguments and one that runs it


def _add_sample(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to draw; an empty one draws anything")
    parser.add_argument(
        "--out",
        type=_path,
        required=True,
        help="the picture to write (.png, .jpg, .webp), for several prompts a grid of them in the order given; "
        "or a directory, which gets one picture a prompt: 1.png, 2.png, …",
    )
    _add_sampling(parser)
    parser.add_argument("--guidance", type=_number, metavar="W", help="weight of the prompt (default: the model's)")
    parser.add_argument(
        "--guidance-interval",
        nargs=2,
        type=_number,
        metavar=("LOW", "HIGH"),
        help="guide only where the noise is LOW to HIGH times the signal (default: everywhere)",
    )
    parser.add_argument(
        "--solver",
        choices=("ddpm", "ddim", "dpm"),
        help="how to step; dpm is DPM-Solver++ 2M (default: the model's or, with --steps, what suits so many)",
    )
    parser.add_argument(
        "--threshold",
        type=_threshold,
        metavar="T",
        help="how each step's picture is kept in range: none, static, or the percentile of dynamic thresholding, "
        "such as 0.995, or 0.95:1.5 with a maximum (default: the model's)",
    )
    parser.add_argument(
        "--accelerate", action=argparse.BooleanOptionalAction, default=True, help="use the kernels (default: yes)"
    )


def _sample(args: argparse.Namespace) -> None:
    from . import pictures

    separate = args.out.endswith(("/", os.sep)) or Path(args.out).is_dir()
    names = [Path(args.out, f"{i}.png") for i in range(1, len(args.prompts) + 1)] if separate else [Path(args.out)]
    for name in names:
        pictures.check_picture_path(name)

    _set_threads(args.threads)
    import imagen_fast

    model = imagen_fast.models.Imagen.from_pretrained(args.model)
    if args.accelerate:
        imagen_fast.accelerate(model)
    start = time.perf_counter()
    images = model.sample(
        args.prompts,
        seed=args.seed,
        steps=args.steps,
        guidance=args.guidance,
        guidance_interval=args.guidance_interval and tuple(args.guidance_interval),
        solver=args.solver,
        threshold=args.threshold,
        progress=sys.stderr.isatty(),
    )
    seconds = time.perf_counter() - start
    if not separate and len(images) > 1:
        images = [pictures.grid(images)]
    for i, (image, name) in enumerate(zip(images, names, strict=True)):
        pictures.save_picture(image, name)
        print(f"{name}: {image.width}x{image.height}, seed {args.seed + i}")
    print(f"sampled in {seconds:.1f} s")


def _add_compare_solvers(parser: argparse.ArgumentParser) -> None:
    from .compare_solvers import STEPS

    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to draw (default: that of the demo)")
    parser.add_argument("--out", default="out/solvers.png", help="the picture grid to write (default: %(default)s)")
    parser.add_argument(
        "--steps", type=_count, nargs="+", default=STEPS, metavar="N", help="numbers of steps (default: 5 10 20 50)"
    )
    _add_model_and_seed(parser)


def _compare_solvers(args: argparse.Namespace) -> None:
    _set_threads(args.threads)
    from . import compare_solvers, demo

    prompts = args.prompts or demo.PROMPTS
    compare_solvers.run(
        prompts, args.out, model=args.model, steps=args.steps, seed=args.seed, progress=sys.stderr.isatty()
    )


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="out/demo.png", help="the picture grid to write (default: %(default)s)")
    _add_sampling(parser)


def _demo(args: argparse.Namespace) -> None:
    _set_threads(args.threads)
    from .demo import run

    run(args.out, model=args.model, seed=args.seed, steps=args.steps, progress=sys.stderr.isatty())


def _add_env(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON")


def _env(args: argparse.Namespace) -> None:
    from . import environment

    found = environment.collect()
    print(environment.to_json(found) if args.json else environment.to_table(found))


def _add_bench(parser: argparse.ArgumentParser) -> None:
    from .bench.run import add_arguments

    add_arguments(parser)


def _bench(args: argparse.Namespace) -> int | None:
    from .bench.run import main as bench

    return bench(args)


def _add_tune(parser: argparse.ArgumentParser) -> None:
    from .tune import add_arguments

    add_arguments(parser)


def _tune(args: argparse.Namespace) -> None:
    from .tune import main as tune

    tune(args)


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=("emoji",), help="which data set: emoji, with English and Chinese captions")
    parser.add_argument("--out", type=_path, required=True, metavar="DIR", help="the directory to write")
    parser.add_argument("--font", metavar="FILE", help="a colour bitmap font (default: Debian's Noto Color Emoji)")
    parser.add_argument("--annotations", metavar="DIR", help="CLDR's annotations (default: Debian's)")


def _data(args: argparse.Namespace) -> None:
    from .training.emoji import build_dataset

    dataset = build_dataset(args.out, font=args.font, annotations_dir=args.annotations, progress=sys.stderr.isatty())
    print(f"{args.out}: {len(dataset)} pictures")


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a configuration file, or the name of one that ships")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a key, such as steps=100; may repeat",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in DIR")
    parser.add_argument(
        "--out", type=_path, metavar="DIR", help="where checkpoints and sample grids go (default: the config's)"
    )


def _train(args: argparse.Namespace) -> None:
    from .training.trainer import train

    print(train(args.config, overrides=args.set, out=args.out, resume=args.resume, progress=sys.stderr.isatty()))


def _add_assemble(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="the directory of a run of stage base")
    parser.add_argument("super_resolution", nargs="*", metavar="SR", help="directories of runs of super-resolution")
    parser.add_argument("--out", type=_path, required=True, metavar="DIR", help="the model's directory to write")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="of the weights"
    )


def _assemble(args: argparse.Namespace) -> None:
    import torch

    from .training.assemble import assemble

    model = assemble(args.base, *args.super_resolution)
    model.save_pretrained(args.out, dtype=getattr(torch, args.dtype))
    print(f"{args.out}: {' to '.join(f'{stage.size}²' for stage in model.config.stages)}")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, metavar="DIR", help="the data set that the model was trained on")
    parser.add_argument("--out", type=_path, metavar="FILE", help="write the results as JSON, too")
    parser.add_argument("--count", type=_count, metavar="N", help="captions a language (default: one a picture)")
    _add_sampling(parser)


def _evaluate(args: argparse.Namespace) -> None:
    _set_threads(args.threads)
    from .training.evaluate import run

    run(
        args.model,
        args.data,
        out=args.out,
        count=args.count,
        steps=args.steps,
        seed=args.seed,
        progress=sys.stderr.isatty(),
    )


@dataclass(frozen=True)
class Command:
    """One word after `imagen-fast`."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]


COMMANDS = {
    "sample": Command("draw pictures from sentences", _add_sample, _sample),
    "demo": Command("draw four pictures with and without the kernels, and compare", _add_demo, _demo),
    "compare-solvers": Command(
        "draw with every solver in few and in many steps, side by side", _add_compare_solvers, _compare_solvers
    ),
    "env": Command("show machine, versions and backends; for a missing backend, why", _add_env, _env),
    "bench": Command("time the kernels against PyTorch and the limits of the machine", _add_bench, _bench),
    "tune": Command("find launch configurations of the Triton kernels on this machine's GPU", _add_tune, _tune),
    "data": Command("build a data set to train on", _add_data, _data),
    "train": Command("train a stage of a model from a configuration", _add_train, _train),
    "assemble": Command("make a model of trained stages", _add_assemble, _assemble),
    "evaluate": Command("count how often a trained model draws what the sentence names", _add_evaluate, _evaluate),
}


# ---- Parsing


def _parser(arguments: Sequence[str]) -> Parser:
    """The parser; only the command that is called gets its arguments, since some must be imported for it."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        release = version("imagen-fast")
    except PackageNotFoundError:
        release = "not installed"
    parser = Parser(prog="imagen-fast", description="Pictures from sentences, on custom kernels.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"imagen-fast {release}")
    parser.add_argument("--debug", action="store_true", help="show a traceback for every error")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    called = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, command in COMMANDS.items():
        sub = subparsers.add_parser(name, help=command.help, description=_sentence(command.help), allow_abbrev=False)
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        sub.set_defaults(run=command.run)
        if name == called:
            command.add_arguments(sub)
    return parser


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    _add_model_and_seed(parser)
    parser.add_argument("--steps", type=_count, metavar="N", help="sampling steps a stage (default: the model's)")


def _add_model_and_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="fixes the pictures (default: %(default)s)")
    parser.add_argument(
        "--model", default="emoji", metavar="DIR", help="a model's directory, or emoji: the one that ships (default)"
    )
    parser.add_argument("--threads", type=_count, metavar="N", help="CPU threads (default: PyTorch's choice)")


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _seed(text: str) -> int:
    value = _parsed(int, text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2^63 - 1, got {text}")
    return value


def _path(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def _count(text: str) -> int:
    value = _parsed(int, text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _number(text: str) -> float:
    value = _parsed(float, text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text}")
    return value


def _threshold(text: str) -> Any:
    """What `Imagen.sample` takes as threshold."""
    if text in ("none", "static"):
        return text
    percentile, colon, maximum = text.partition(":")
    values = [_number(percentile)] + ([_number(maximum)] if colon else [])
    from .reference.guidance import DynamicThreshold

    try:
        return DynamicThreshold(values[0], max_value=values[1] if colon else None)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _parsed(kind: Callable[[str], Any], text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        noun = {int: "a whole number", float: "a number"}[kind]  # type: ignore[index]
        raise argparse.ArgumentTypeError(f"must be {noun}, got {text!r}") from None


# ---- Messages


@contextlib.contextmanager
def _plain_messages() -> Iterator[None]:
    """Show warnings as one line without a source line; write any character on any terminal."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, category, *_: print(
            f"imagen-fast: warning: {_one_line(message)}", file=sys.stderr
        )
        yield


def _explained(error: Exception) -> str | None:
    """One line for an error that the user can mend; None for any other."""
    if isinstance(error, ModuleNotFoundError):
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        return extra and f"{error.name} is not installed (pip install 'imagen-fast[{extra}]')"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return _one_line(error) or type(error).__name__


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
