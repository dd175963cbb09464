# make quickstart | test | lint | figures. Each first builds .venv from requirements.txt when that is missing or stale.
PYTHON ?= python3
WORKERS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.requirements-installed

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test lint figures

help:
	@echo "make quickstart   train a small model on the standard library's source (CPU), then evaluate it"
	@echo "make test         run the test suite             (ARGS='-k selection' passes options to pytest)"
	@echo "make lint         check style and formatting with ruff"
	@echo "make figures      draw the pictures of docs/ again"
	@echo "make venv         only install: .venv from requirements.txt"
	@echo "PYTHON=python3.13 chooses the interpreter that .venv is made from (3.12 or newer)."

venv: $(INSTALLED)

# The stamp is written last, so an interrupted or failed install is taken up again by the next make. A .venv whose pip
# does not run (its interpreter is gone, or its creation failed half-way) is made anew.
$(INSTALLED): requirements.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: no interpreter '$(PYTHON)'; set PYTHON=/path/to/python (3.12 or newer)" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  $(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 12) or sys.exit(f"make: Python 3.12 or newer is needed, but {sys.executable} is {v[0]}.{v[1]}.{v[2]}; set PYTHON=, for example: make PYTHON=python3.12 $(firstword $(MAKECMDGOALS))")' \
	  && $(PYTHON) -m venv --clear $(VENV); }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

quickstart: $(INSTALLED)
	$(BIN)/python train.py --config=configs/quickstart.py --workdir=runs/quickstart
	$(BIN)/python eval.py --config=configs/quickstart.py --workdir=runs/quickstart

# Tests compile much and compute little. Made fast and less good, and by XLA's older emitters of loops (which operations are
# fused stays the same), code takes less than half as long to compile. Plain pytest compiles as a user's program is compiled.
# As many threads as there are processors help no worker where each processor has one: XLA would split a program to compile
# its parts side by side, which costs more in all, and NumPy's idle threads would spin.
# Each worker takes half of the tests in their order, then what another has left: tests of a module share what they compile.
test: $(INSTALLED)
	OPENBLAS_NUM_THREADS=1 XLA_FLAGS="--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 \
	    --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters $$XLA_FLAGS" \
	  $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(INSTALLED)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

figures: $(INSTALLED)
	$(BIN)/python docs/make_figures.py
