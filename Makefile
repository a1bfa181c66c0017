# `make` lists the commands. Each one makes or updates .venv first, which takes no time if nothing changed.
PYTHON ?= python3
MODEL ?= tests/assets/recall-model
ARGS ?=
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test lint clean

help: ## this list
	@awk -F ' *## *' '/^[a-z]+:.*## / { sub(/:.*/, "", $$1); printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: ## make .venv with vLLM, memos and what tests need (PYTHON=python3.12; MEMOS_VLLM=cpu, cuda or a version)
	@$(PYTHON) .ci/install.py

demo: install ## serve a model with memory and watch it remember (MODEL=Qwen/Qwen3-0.6B; default: the model in tests/assets)
	@$(BIN)/python -m benchmarks.demo --model $(MODEL)

test: install ## run all tests, or some (ARGS="tests/store -k salt -x")
	@$(BIN)/python -m pytest $(ARGS)

lint: install ## ruff: rules and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

clean: ## remove caches, builds and the demo's data; .venv stays
	rm -rf build dist .demo .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name .venv -prune -o -name .git -prune -o -type d -name __pycache__ -exec rm -rf {} +
