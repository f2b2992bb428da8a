# Everything runs in .venv, which the first target that needs it sets up (about two minutes); the benchmarks in .venv-bench,
# which has the same versions and, beside them, the libraries that are compared with; that of features in .venv-bench-sae,
# as sae-lens needs another version of one of these.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
EXTRAS := $(VENV)/.installed-extras
BENCH  := .venv-bench
SAE    := .venv-bench-sae
PARTS  := serving attribution concurrency clustering graphs interventions features
PART   ?= $(PARTS)
OTHERS := $(filter-out features,$(PART))
WITH_SAE := $(filter features,$(PART))

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all check bench clean

help: ## say what can be done
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## set up .venv with the pinned versions

demo: install ## the main job end to end on the embedded model
	$(BIN)/sightline demo

test: install ## the tests, without the slow ones
	$(BIN)/python -m pytest -m "not slow"

test-all: $(EXTRAS) ## all tests, those of quantised models and of sae-lens included; the first time it installs what these need
	$(BIN)/python -m pytest

check: install ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(if $(OTHERS),$(BENCH)/.installed) $(if $(WITH_SAE),$(SAE)/.installed) ## every benchmark, as a table and as JSON; PART=attribution measures one part
	$(if $(OTHERS),$(BENCH)/bin/python -m benchmarks $(OTHERS))
	$(if $(WITH_SAE),$(SAE)/bin/python -m benchmarks $(WITH_SAE))

clean: ## remove what was built, .venv too
	rm -rf $(VENV) $(BENCH) $(SAE) build *.egg-info demo_out .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt -e '.[dev]'
	@touch $@

$(EXTRAS): $(STAMP)
	$(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt -e '.[dev,gptq,bnb,sae]'
	@touch $@

$(BENCH)/.installed: pyproject.toml constraints.txt benchmarks/constraints.txt | $(BENCH)/bin/python
	$(BENCH)/bin/python -m pip install --quiet --progress-bar off -c constraints.txt -c benchmarks/constraints.txt -e '.[bench]'
	@touch $@

$(SAE)/.installed: pyproject.toml constraints.txt | $(SAE)/bin/python
	$(SAE)/bin/python -m pip install --quiet --progress-bar off -c constraints.txt -e '.[sae]' httpx2
	@touch $@

$(BIN)/python $(BENCH)/bin/python $(SAE)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Sightline needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make $(firstword $(MAKECMDGOALS)) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' comes without venv; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "Setting up $(@:/bin/python=): this takes a few minutes, once."
	$(PYTHON) -m venv $(@:/bin/python=)
