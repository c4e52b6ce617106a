"""One file per op, with a function `cases()`; `imagen_fast.bench.registry` finds them."""
