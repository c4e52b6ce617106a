"""Fills README.md between `<!-- results:OP -->` and `<!-- /results:OP -->`, and the marks `support` and `host_tests`.

    python tools/update_readme.py            writes README.md
    python tools/update_readme.py --check    only says whether it is up to date (exit status 1 if not)

Results are the headline rows of every `bench/results/OP-*.json`, with the throughput of models by batch; support is
what the ops themselves declare; how the hosts' own tests ended is in `bench/results/host_tests/*.json`. No number and
no claim of a kernel was typed by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from imagen_fast import backends, ops
from imagen_fast.bench import report, results
from imagen_fast.files import atomic_file

ROOT = Path(__file__).resolve().parents[1]
PLACE = re.compile(r"(?P<start><!-- results:(?P<op>\w+) -->\n).*?(?P<end><!-- /results:(?P=op) -->)", re.DOTALL)

MARK = r"(?P<start><!-- {0} -->\n).*?(?P<end><!-- /{0} -->)"


def filled(text: str, folder: Path) -> str:
    """`text` with every marked place holding the tables made of the result files in `folder`."""

    def tables(place: re.Match[str]) -> str:
        files = sorted(folder.glob(f"{place['op']}-*.json"), key=lambda file: file.stem)
        if not files:
            raise SystemExit(f"README.md shows results of {place['op']}, and {folder} has none")
        made = []
        for result in map(results.load, files):
            made += filter(None, [report.markdown(report.select(result, tag="headline")), report.throughput(result)])
        return place["start"] + "".join(f"\n{table}\n\n" for table in made) + place["end"]

    text = PLACE.sub(tables, text)
    for mark, table in {"support": support(), "host_tests": host_tests(folder)}.items():
        place = re.compile(MARK.format(mark), re.DOTALL)
        text = place.sub(lambda found, table=table: f"{found['start']}\n{table}\n\n{found['end']}", text)
    return text


def support() -> str:
    """Which op has which kernels."""
    lines = [f"| | {' | '.join(f'`{name}`' for name in backends.NAMES)} |", "|---" * (len(backends.NAMES) + 1) + "|"]
    for op in ops.__all__:
        has = backends._OPS[op].backends
        lines.append(f"| `{op}` | {' | '.join('yes' if name in has else 'not yet' for name in backends.NAMES)} |")
    return "\n".join(lines)


def host_tests(folder: Path) -> str:
    """How the hosts' own tests ended: a line for each file of `tools/host_tests.py`."""
    columns = ("library", "its tests", "pass both ways", "only plain", "skipped", "fail plain", "objects accelerated")
    lines = [f"| {' | '.join([*columns, 'commit'])} |", "|---" * 2 + "|--:" * 5 + "|---|"]
    for file in sorted((folder / "host_tests").glob("*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        plain, broken = found["plain"], len(found["broken"])
        library = f"{found['host'].replace('_', '-')} {found['version']}"
        tests = ", ".join(f"`{Path(test).stem}`" for test in found["tests"])
        if found["tests_of"] != found["version"]:
            tests += f" of {found['tests_of']}"
        objects = sum(counts["accelerated"] for counts in found["objects"].values())
        numbers = [plain.get("passed", 0) - broken, broken, plain.get("skipped", 0), plain.get("failed", 0), objects]
        commit = found["provenance"]["commit"][:10]
        lines.append(f"| {library} | {tests} | {' | '.join(map(str, numbers))} | {commit} |")
    return "\n".join(lines)


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
