# Each target makes .venv and installs what it needs by itself; nothing is done again while pyproject.toml and
# constraints.txt are unchanged.
#
#   make quickstart              fine-tune a real model on this machine and see it get better
#   make test                    the tests;   make test-peers   those that take many minutes
#   make lint                    style, types, layers
#   make bench                   speed and memory of training beside the transformers Trainer; BENCH=generate, packing,
#                                preprocess, convert and so on: the other programs of benchmarks/; BENCH=all: all in a row
#   make bench-gpu               training and generation on one GPU, 10 minutes (docs/gpu.md)
#   make layouts                 every layout of processes against one process; rewrites the table of docs/layouts.md
#   make docs                    rewrite what the docs have from the code: tables of formats, pages of verbs, types of keywords
#   make docs-site               build the documentation site in build/site, with every link checked
#   make clean                   remove .venv, caches and runs/
#
# PYTHON    the interpreter to make .venv with (3.11 or newer): make quickstart PYTHON=python3.12
# PIP_ARGS  more arguments for pip: another index for torch's CPU-only or CUDA build, a folder of wheels, a proxy:
#           make quickstart PIP_ARGS="--extra-index-url URL"      make test PIP_ARGS="--find-links FOLDER"
# ARGS      more arguments for the command itself: make quickstart ARGS="--max_steps 20", make test ARGS="-k rope"

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
BENCH ?= train
WORKERS ?= 2

BIN := .venv/bin
## tests write beside the code and not into the shared folder of /tmp, which other runs and the system tidy up
PYTEST_TMP := .pytest_tmp
RUNTIME := .venv/.installed-runtime
DEV := .venv/.installed-dev
PEERS := .venv-peers/.installed
PEER_PACKAGES := paddlepaddle==3.3.1 "llama-cpp-python[server]==0.3.36"
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_ARGS)

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-peers lint bench bench-gpu layouts docs docs-site clean

help:
	@sed -n 's/^#  \{0,1\}//p' Makefile

$(RUNTIME): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "arriero needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@if [ ! -x $(BIN)/pip ]; then echo "== making .venv"; rm -rf .venv; $(PYTHON) -m venv .venv; fi
	@echo "== installing arriero and its dependencies into .venv (once; torch takes a few minutes)"
	@$(PIP_INSTALL) --editable '.[gguf,plot]'
	@touch $@

$(DEV): $(RUNTIME)
	@echo "== installing what the tests and checks need into .venv (once)"
	@$(PIP_INSTALL) --editable '.[dev]'
	@touch $@

quickstart: $(RUNTIME)
	@$(BIN)/arriero quickstart $(ARGS)

## worksteal: one worker begins with the tests of several processes, the other with those of one and takes over what is left of
## them at the end, a run of tests at a time, so that files and their fixtures stay together
test: $(DEV)
	@$(BIN)/arriero download smollm2-135m-instruct
	@mkdir -p $(PYTEST_TMP)
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --basetemp $(PYTEST_TMP)/$$$$ -m "not peers" -n $(WORKERS) --dist worksteal $(ARGS)
	@rm -rf $(PYTEST_TMP)

# Programs on the other side of a file, in an environment of their own: llama.cpp is compiled, which takes 10 to 20 minutes.
$(PEERS):
	@echo "== installing paddle and llama.cpp into .venv-peers (once; many minutes)"
	@$(PYTHON) -m venv .venv-peers
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) $(PEER_PACKAGES)
	@touch $@

test-peers: $(DEV) $(PEERS)
	@mkdir -p $(PYTEST_TMP)
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --basetemp $(PYTEST_TMP)/$$$$ -m peers $(ARGS)
	@rm -rf $(PYTEST_TMP)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(DEV)
	$(BIN)/python benchmarks/$(BENCH).py $(ARGS)

bench-gpu: $(RUNTIME)
	$(BIN)/python benchmarks/gpu.py $(ARGS)

layouts: $(DEV)
	$(BIN)/python benchmarks/layouts.py $(ARGS)

docs: $(DEV)
	$(BIN)/python docs/make_formats.py
	$(BIN)/python docs/make_keywords.py
	$(BIN)/python docs/make_verbs.py $(ARGS)

docs-site: $(DEV)
	$(BIN)/python docs/make_site.py
	$(BIN)/zensical build --strict --clean

clean:
	rm -rf .venv .venv-peers .venv-litgpt .venv-torchtune .venv-genai .venv-paddlenlp .pytest_cache $(PYTEST_TMP) .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist src/*.egg-info runs
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
