# On a bare machine `make demo` and `make test` each set everything up first, in .venv with pinned versions: they need
# Python 3.10 or newer and a C++ compiler. Set-up is remembered by the stamp files in .venv, so a second call starts at
# once, and a change to the C++ sources compiles only what changed.
#
#   make demo    four pictures from sentences, eager and accelerated: out/demo.png and a table
#   make test    the tests, in two processes (one file, in one: make test ARGS=tests/test_cli.py)
#   make lint    ruff, mypy, clang-format
#   make bench   the benchmarks, to out/bench (one op: make bench ARGS="--op group_norm_act")
#   make test-gpu, make bench-gpu   the same on a machine with a GPU, to out/gpu; they install nothing and use the PyTorch
#                that PYTHON has (where: make test-gpu ARGS="--output DIR")
#   make check-wheel  the wheel in a new environment (with another PyTorch: make check-wheel ARGS="--torch 2.12.0")
#   make clean   removes what was built and all caches; keeps .venv and your results
#   make distclean   removes .venv too

PYTHON ?= python3
ARGS   ?=

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip --disable-pip-version-check
GET  := $(PIP) install --no-compile

# While the libraries are built, pip installs what their building does not need. Of `make clean test` each waits its turn.
ifeq ($(word 2,$(MAKECMDGOALS)),)
MAKEFLAGS += -j2
endif
unexport MAKEFLAGS

NATIVE_SOURCES := $(shell find csrc -type f 2>/dev/null)
FORMATTED      := $(filter %.h %.hpp %.cuh %.cpp %.cu,$(NATIVE_SOURCES) $(shell find tests/cuda -type f 2>/dev/null))
NATIVE_LIBRARY := imagen_fast/lib/libimagen_fast_cpu.so

.PHONY: demo test lint bench test-gpu bench-gpu check-wheel clean distclean setup
.DELETE_ON_ERROR:

demo: setup
	@mkdir -p out
	@$(BIN)/imagen-fast demo --out out/demo.png $(ARGS)

test: setup $(VENV)/.hosts
	@$(BIN)/python -m pytest -q --durations=15 $(if $(ARGS),$(ARGS),-n 2 --no-loadscope-reorder)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(FORMATTED),$(BIN)/clang-format --dry-run -Werror $(FORMATTED))
	$(BIN)/python tools/update_readme.py --check

bench: setup
	@$(BIN)/imagen-fast bench --output out/bench $(ARGS)

test-gpu:
	$(PYTHON) tools/gpu.py test $(ARGS)

bench-gpu:
	$(PYTHON) tools/gpu.py bench $(ARGS)

check-wheel: setup
	$(BIN)/python tools/check_wheel.py $(ARGS)

clean:
	rm -rf build dist imagen_fast/lib *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	rm -f $(VENV)/.native

distclean: clean
	rm -rf $(VENV)

setup: $(VENV)/.native $(VENV)/.package

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "imagen_fast needs Python 3.10 or newer and finds no '$(PYTHON)'. Install it, or name it: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "imagen_fast needs Python 3.10 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments: its venv module is missing (Debian, Ubuntu: apt install python3-venv)." >&2; exit 1; }
	@echo "Making a virtual environment in $(VENV) with $$($(PYTHON) --version)."
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# With what setup.py needs beside it
$(VENV)/.torch: requirements-torch.txt $(VENV)/.created
	@echo "Installing PyTorch into $(VENV), once."
	@$(GET) -c requirements.txt -r requirements-torch.txt ninja numpy setuptools wheel
	@touch $@

$(VENV)/.requirements: requirements.txt $(VENV)/.torch
	@echo "Installing the other packages, as pinned in requirements.txt."
	@$(GET) -q -c requirements-torch.txt -r requirements.txt
	@touch $@

# Host libraries that tests import in processes of their own: two versions of one, and neither with what it depends on
# (torchvision among that, which must not come in).
$(VENV)/.hosts: requirements-hosts.txt $(VENV)/.requirements
	@while read -r host; do $(GET) -q --no-deps --target "$(VENV)/hosts/$$host" "$$host" || exit 1; done < $<
	@touch $@

# Without a C++ compiler this says so and everything runs on plain PyTorch. The stamp is then left out, so that the next
# call looks for a compiler again.
$(VENV)/.native: setup.py $(NATIVE_SOURCES) $(VENV)/.torch
	@echo "Building the C++ library, and where nvcc is the CUDA one: minutes the first time, later only what changed."
	@$(BIN)/python setup.py -q build_ext --inplace
	@test ! -e $(NATIVE_LIBRARY) || touch $@

$(VENV)/.package: setup.py pyproject.toml $(VENV)/.requirements | $(VENV)/.native
	@echo "Installing imagen_fast itself, in place."
	@$(PIP) install -q -e . --no-build-isolation --no-deps
	@touch $@
