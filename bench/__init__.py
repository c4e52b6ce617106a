"""Benchmarks: cases and peers per op, honest timing, JSON results with their provenance, tables and plots.

    imagen-fast bench --op group_norm_act            times the op against its peers and prints a table
    python -m imagen_fast.bench.report FILE...       tables and plots from recorded results

`registry` says what a case is, `cases/<op>.py` lists those of an op, `timing` is the clock, `floor` the limit of
the machine, `run` puts them together, `results` and `report` keep and show what came out.
"""

from __future__ import annotations
