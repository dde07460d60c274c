# Everything a newcomer needs is one word after `make`. Needs only Python >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install demo test test-slow check clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP) ## Install Kelvin and what its tests need into .venv

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (a few minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP) ## Start everything on this machine, make one picture, stop
	@$(BIN)/kelvin demo --json

test: $(STAMP) check ## Lint, types and every test that needs no GPU
	@$(BIN)/python -m pytest -m "not slow and not gpu" --numprocesses 2

test-slow: $(STAMP) ## Soak, long chaos, redeploy under load
	@$(BIN)/python -m pytest -m slow

check: $(STAMP) ## ruff and mypy only
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
