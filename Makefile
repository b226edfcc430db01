PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help quickstart test check bench docs soak

help:
	@echo "make quickstart   a model that learns from MovieLens-100K, event by event, in under three minutes"
	@echo "make test         the tests"
	@echo "make check        style, types and layers"
	@echo "make bench        against River and PyTorch, in one run, printing ratios"
	@echo "make docs         the site, in docs/_build/html"
	@echo "make soak         the long tests: faults, processes killed at random, ten minutes at full speed"

quickstart: .venv
	$(BIN)/python examples/quickstart.py

# A process a core, and a file in one of them as a whole: what a file starts (a broker, a cluster) it starts once.
test: .venv
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

check: .venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/.bench
	$(BIN)/python -m benchmarks

docs: .venv/.docs
	$(BIN)/sphinx-build -W --keep-going -q docs docs/_build/html
	@echo "docs/_build/html/index.html"

soak: .venv
	$(BIN)/python -m pytest -m soak tests

# The stamps are written last, so that an install that was cut short is done again.
.venv: .venv/.made

.venv/.made: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -e ".[dev,plot]"
	@touch $@

.venv/.bench .venv/.docs: .venv/.%: .venv/.made
	$(PIP) -e ".[$*]"
	@touch $@
