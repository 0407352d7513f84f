# Two commands on a fresh machine: `make demo` and `make test`. Each sets up what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Everything installed is newer than what asks for it.
INSTALLED := $(VENV)/.installed
PEERS := .venv-peers
S3 := .venv-s3
PURELIB := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
# Questions for the peers, and how many of them.
DATA ?=
N ?= 20

.PHONY: setup demo test s3 notebooks wheel check fix bench peers clean

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

# ObjectStore on a server of S3's protocol. An environment of its own, since botocore refuses the
# python-dateutil of constraints.txt: what it asks for stands before what is installed in .venv.
s3: $(S3)/.installed
	$(S3)/bin/python -m pytest tests/stores -k s3

$(S3)/.installed: $(INSTALLED)
	$(PYTHON) -m venv --clear $(S3)
	$(BIN)/python $(PURELIB) > "$$($(S3)/bin/python $(PURELIB))/seen.pth"
	$(S3)/bin/python -m pip install --quiet s3fs==2026.9.0 'moto[s3]==5.2.5' boto3==1.43.117 flask flask-cors
	@touch $@

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

# What users would pick instead, beside SAC: make peers DATA=dev.json. An environment of its own, since
# kvpress and llmlingua refuse transformers 5: they are installed without their dependencies.
peers: $(PEERS)/.installed
	$(PEERS)/bin/sac-rag bench peers --list
ifneq ($(DATA),)
	$(PEERS)/bin/sac-rag bench quality --data $(DATA) -k 1 -n $(N) --ratio 5 --ratio 15 --out runs/peers
	$(PEERS)/bin/sac-rag bench peers --data $(DATA) -k 1 -n $(N) --ratio 5 --ratio 15 --out runs/peers
	$(PEERS)/bin/sac-rag report runs/peers
endif

$(PEERS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[peers]'
	$(PEERS)/bin/python -m pip install --quiet --no-deps kvpress==0.5.5 llmlingua==0.2.2
	@touch $@

clean:
	rm -rf $(VENV) $(PEERS) $(S3) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
