# Set-up, tests and the benchmark, from a fresh clone with only Python 3.11 (or newer), venv and make.
# More arguments for a command: make test ARGS="-k pool", make bench ARGS="--help".

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTHON ?= $(firstword $(shell python3.11 -c 'print("python3.11")' 2>/dev/null) python3)
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
ARGS ?=

# The one environment in use is $(VENV), whatever the caller has active.
unexport VIRTUAL_ENV PYTHONHOME PYTHONPATH PIP_USER PIP_TARGET PIP_PREFIX CONDA_PREFIX

.DELETE_ON_ERROR:
.PHONY: help install bench test lint format types clean

help:
	@echo "make bench    set up if needed, then check, inspect, time and report every case"
	@echo "make test     set up if needed, then run the tests"
	@echo "make install  set up alone: $(VENV), with the versions in constraints.txt"
	@echo "make lint     ruff: rules and format    make types  mypy    make format  ruff's format, applied"
	@echo "make clean    remove $(VENV) and everything built"

install: $(STAMP)

# pip stays as the interpreter brought it. hatchling comes first, so that the build of the package is pinned as well.
$(STAMP): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "tileconv needs Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	$(PIP_INSTALL) --quiet hatchling
	$(PIP_INSTALL) --quiet --no-build-isolation --editable '.[bench,train,test,lint]'
	touch $@

bench: $(STAMP)
	$(BIN)/tileconv bench $(ARGS)

# Two workers with one thread each: the interpreter is Python, so a second process helps and a second thread does not.
test: $(STAMP)
	OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
