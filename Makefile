# `make demo` and `make test` do everything on a fresh machine, the virtual environment included.
PYTHON ?= python3
BIN := .venv/bin
DEMO ?=
BENCH ?=
MODEL ?= tiny-moe
STUDIES ?=

.PHONY: demo test lint types imports check docs bench evidence families compat models release clean

demo: .venv/demo
	$(BIN)/lamella demo --output runs/demo $(DEMO)

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=10

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/mypy

imports: .venv/installed
	$(BIN)/lint-imports

check: lint types imports test

# The documentation site, in site/.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

bench: .venv/installed
	$(BIN)/python -m benchmarks $(BENCH)

# docs/evidence.md and docs/evidence/, from what is kept of the project's own studies: make evidence STUDIES="--add runs/trec-shapes"
evidence: .venv/installed
	$(BIN)/python -m studies $(STUDIES)

# docs/what-runs-where.md: every family of transformers x every method; goes on where it was stopped.
families: .venv/installed
	-$(BIN)/python -m pytest -n 2 --dist worksteal -m heavy tests/families
	$(BIN)/python -m tests.families

# docs/install.md's table: unit tests with the lowest and the newest versions that pyproject.toml allows; gigabytes in runs/.
compat: .venv/installed
	$(BIN)/python -m tests.compat

# A small model to study: make models MODEL="switch-trec layers=4"
models: .venv/installed
	$(BIN)/python -m models $(MODEL)

# dist/: the wheel and the source archive, their metadata checked; tests/test_install.py installs and uses the wheel.
release: .venv/installed
	rm -rf dist
	$(PIP) --constraint constraints.txt build twine
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m pytest tests/test_install.py

clean:
	rm -rf .venv runs build dist site src/*.egg-info .*_cache

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# What the demo needs, of which only what it imports is ever compiled. torch is installed first and by its exact version:
# an open range would choose another, far larger build.
.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --no-compile "$$(grep '^torch==' constraints.txt)"
	$(PIP) --no-compile --constraint constraints.txt --editable ".[demo]"
	touch $@

# What tests and checks need beside it.
.venv/installed: .venv/demo
	$(PIP) --constraint constraints.txt --editable ".[dev]"
	touch $@

# What the documentation site is built with.
.venv/docs: .venv/demo
	$(PIP) --constraint constraints.txt --editable ".[docs]"
	touch $@
