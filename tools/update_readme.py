"""Fills README.md from bench/results: between the marks `<!-- results:OP -->` and `<!-- /results:OP -->`.

    python tools/update_readme.py            writes README.md
    python tools/update_readme.py --check    only says whether it is up to date (exit status 1 if not)

Each place gets the headline rows of every `bench/results/OP-*.json`, so that no number in it was typed by hand.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from imagen_fast.bench import report, results
from imagen_fast.files import atomic_file

ROOT = Path(__file__).resolve().parents[1]
PLACE = re.compile(r"(?P<start><!-- results:(?P<op>\w+) -->\n).*?(?P<end><!-- /results:(?P=op) -->)", re.DOTALL)


def filled(text: str, folder: Path) -> str:
    """`text` with every marked place holding the tables made of the result files in `folder`."""

    def tables(place: re.Match[str]) -> str:
        files = sorted(folder.glob(f"{place['op']}-*.json"))
        made = [report.markdown(report.select(results.load(file), tag="headline")) for file in files]
        return place["start"] + "".join(f"\n{table}\n\n" for table in made) + place["end"]

    return PLACE.sub(tables, text)


def main() -> int:
    parser = argparse.ArgumentParser(description="Fill README.md with the tables of bench/results.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if it is out of date")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = filled(old, ROOT / "bench" / "results")
    if new == old:
        return 0
    if args.check:
        print("README.md is out of date: run .venv/bin/python tools/update_readme.py", file=sys.stderr)
        return 1
    with atomic_file(readme) as temporary:
        temporary.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
