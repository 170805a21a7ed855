# Everything runs in .venv, made here from constraints.txt. Another interpreter: make PYTHON=python3.12 test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: help quickstart test test-gpu test-slow test-faults lint format clean

help:
	@echo "make quickstart   train SFT, GRPO and anchored GRPO on a synthetic world (CPU, about 4 minutes)"
	@echo "make test         format, lint and type checks, then the tests"
	@echo "make test-gpu     the tests that need a CUDA device"
	@echo "make test-slow    the tests that take minutes (AAPA_DATA names the real data)"
	@echo "make test-faults  kills of every run and command, flipped bits (about an hour)"
	@echo "make lint         the checks alone"
	@echo "make format       rewrite the code in the house format"
	@echo "make clean        remove caches and .venv; runs/ stays"

quickstart: $(VENV)/.core
	$(BIN)/aapa recipe configs/recipes/quickstart.yaml

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -q -m "not slow and not gpu"

test-gpu: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m gpu

test-slow: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,ray]'
	$(BIN)/python -m pytest -q -m slow

test-faults: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/faults

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing into $(VENV), a few minutes the first time'
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing into $(VENV), a few minutes the first time'
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.core

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
