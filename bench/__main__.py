"""`python -m imagen_fast.bench`: the same as `imagen-fast bench`."""

from __future__ import annotations

import argparse
import sys

from ..errors import UserError
from . import run


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m imagen_fast.bench", description="Time the ops against their peers."
    )
    run.add_arguments(parser)
    try:
        return run.main(parser.parse_args())
    except UserError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
