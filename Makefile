# Two commands on a fresh machine: `make demo` and `make test`. Each sets up what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Everything installed is newer than what asks for it.
INSTALLED := $(VENV)/.installed

.PHONY: setup demo test notebooks wheel check fix bench clean

setup: $(INSTALLED)
	@$(BIN)/sac-rag models pull

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup
	@$(BIN)/sac-rag demo

test: setup check
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# Warnings are its libraries' own; a notebook takes one to two minutes.
notebooks: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 4 -W default --nbmake --nbmake-timeout 900 notebooks

wheel: setup
	$(BIN)/python tests/wheel/check.py

check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

fix: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: setup
	$(BIN)/sac-rag bench speed
	$(BIN)/sac-rag bench precompress

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
