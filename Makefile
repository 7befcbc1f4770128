# `make repro` runs the pipeline, `make test` its tests; both first set up .venv from requirements.lock.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help repro test faults ui clean

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
export PATH := $(CURDIR)/$(BIN):$(PATH)
unexport VIRTUAL_ENV PYTHONPATH PYTHONHOME
# Where this one is set, every stage compiles what it imports anew, which takes half of its start.
unexport PYTHONDONTWRITEBYTECODE
export PYTHONUNBUFFERED := 1

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

repro: $(STAMP) ## run everything that changed: data, training, evaluation, search, report
	@# A downloaded archive has no .git, and there DVC must be told so.
	@git rev-parse --git-dir >/dev/null 2>&1 || dvc config --quiet --local core.no_scm true
	@dvc repro
	@vaesweep sync || true  # a tracking server that is away costs nothing: runs are on disk, and a later sync uploads them
	@echo
	@echo "report:     $$(python -c 'from pipeline.config import load_settings; print(load_settings().reports)')/report.md"
	@echo "MLflow UI:  make ui"

test: $(STAMP) ## lint, import contracts and tests
	@ruff check .
	@ruff format --check .
	@lint-imports
	@pytest

faults: $(STAMP) ## kill, fill, cut off and flip everything that SECURITY.md promises to survive
	@ALL_FAULTS=1 pytest --dist=worksteal tests/faults

ui: $(STAMP) ## open the MLflow UI on http://127.0.0.1:5000
	@vaesweep ui

clean: $(STAMP) ## remove trained cells that no study or search of any scale uses
	@vaesweep clean

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "vaesweep needs Python 3.11 or newer; name one: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/uv || $(PYTHON) -m venv --clear .venv  # what was left of one that was not finished goes
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@echo "installing the locked packages into .venv (6 GB, one to three minutes)"
	@$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@
