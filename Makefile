# labkit: `make` alone lists what there is. Needs Python >= 3.11, git and make; the rest is installed into .venv.
#
#   PYTHON=python3.12      another interpreter
#   PIP_ARGS='...'         further arguments for pip, e.g. a package index of your own or one with another build of torch
#   LAB_ARGS='...'         further arguments for JupyterLab
#   PYTEST_ARGS='...'      further arguments for pytest, e.g. PYTEST_ARGS='-k supervisor'
#   PYTEST_WORKERS=4       how many tests run side by side; the default is one per core, at most 4
#   TORCH=2.11.0           another torch than the pinned one, in an environment of its own (.venv-torch-2.11.0); with it
#                          `make test` runs what depends on torch: layouts, parity, pipelines, number formats

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

TORCH ?=
VENV := .venv$(if $(TORCH),-torch-$(TORCH))
BIN := $(VENV)/bin
PYTHON ?=
PIP_ARGS ?=
LAB_ARGS ?=
PYTEST_ARGS ?=
PYTEST_WORKERS ?= logical

# Whatever a notebook or a test starts by name comes from the set-up.
export PATH := $(CURDIR)/$(BIN):$(PATH)

# The first interpreter that is new enough and can make an environment; with PYTHON=..., only that one.
define find_python
find_python() { \
	local candidate; \
	for candidate in $(or $(PYTHON),python3.11 python3 python3.12 python3.13); do \
		if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "$$candidate"; return; \
		fi; \
	done; \
	echo "labkit needs Python 3.11 or later with its venv module; tried: $(or $(PYTHON),python3.11 python3 python3.12 python3.13)." \
		"Install one (on Debian and Ubuntu: python3-venv as well) or name it: make PYTHON=/path/to/python3.11" >&2; \
	return 1; \
}
endef

##@ Use
.PHONY: demo
demo: $(VENV)/.set-up-lab ## set up, run notebook 00, print the speed-up table and the path of the report
	@rm -rf demo-output && mkdir -p demo-output
	@export LABKIT_HOME="$(CURDIR)/demo-output/home" LABKIT_UI=static; \
	failed=0; \
	$(BIN)/papermill notebooks/00_start_here.ipynb demo-output/00_start_here.ipynb -k python3 \
		-p report "$(CURDIR)/demo-output/report.html" --execution-timeout 600 \
		2> >(grep -v --line-buffered IPKernelApp >&2) || failed=$$?; \
	$(BIN)/labkit stop --all >/dev/null || failed=1; \
	if [ $$failed != 0 ]; then \
		echo "The demo failed; the notebook as far as it came: demo-output/00_start_here.ipynb" >&2; exit 1; \
	fi; \
	$(BIN)/labkit compare --all; \
	test -s demo-output/report.html; \
	echo; \
	echo "Report with curves (opens in a browser, no kernel needed): $(CURDIR)/demo-output/report.html"

.PHONY: lab
lab: $(VENV)/.set-up-lab ## set up, then open JupyterLab on notebook 00
	$(BIN)/jupyter lab $$([ "$$(id -u)" != 0 ] || echo --allow-root) $(LAB_ARGS) notebooks/00_start_here.ipynb

##@ Check
.PHONY: test
ifeq ($(TORCH),)
test: $(VENV)/.set-up-dev check ## set up, then lint, types and the tests of the first tier, side by side
	@$(call pytest,$(SIDE_BY_SIDE) -m "not slow and not exhaustive and not browser and not gpu and not alone")
	@$(call pytest,-m "alone and not slow and not exhaustive and not gpu")
else
test: $(VENV)/.set-up-dev
	@$(BIN)/python -c 'import torch; print("torch", torch.__version__)'
	@$(call pytest,-m "not exhaustive and not gpu" $(TORCH_TESTS))
endif

.PHONY: proofs
proofs: $(VENV)/.set-up-dev ## the second tier: the lessons, the browser, samples of all layouts and combinations
	$(BIN)/python tests/browser/find_browser.py --install || echo "No browser: the browser tests are skipped."
	@$(call pytest,-m "(slow or browser) and not exhaustive and not gpu")

.PHONY: exhaustive
exhaustive: $(VENV)/.set-up-dev ## the third tier, hours: the sets of cases of which the other two run samples
	@$(call pytest,-m "exhaustive and not gpu")

.PHONY: check
check: $(VENV)/.set-up-dev ## ruff, mypy, notebooks stored without outputs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/nbstripout --verify notebooks/*.ipynb

.PHONY: notebooks
notebooks: $(VENV)/.set-up-dev ## execute every notebook with papermill
	@$(call pytest,-m "not exhaustive" tests/notebooks)

.PHONY: browser
browser: $(VENV)/.set-up-dev ## the tests in the real JupyterLab with headless Chromium
	$(BIN)/python tests/browser/find_browser.py --install
	@$(call pytest,tests/browser)

.PHONY: gpu
gpu: $(VENV)/.set-up-dev ## everything that needs an NVIDIA GPU, in about 20 minutes; goes on where it was interrupted
	@$(BIN)/python -m tests.gpu test-output/gpu

.PHONY: benchmarks
benchmarks: $(VENV)/.set-up-dev ## every script of tests/benchmarks, one after the other
	@for script in tests/benchmarks/[a-z]*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

.PHONY: format
format: $(VENV)/.set-up-dev ## let ruff and nbstripout rewrite what they can
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .
	$(BIN)/nbstripout notebooks/*.ipynb

##@ Keep house
.PHONY: set-up
set-up: $(VENV)/.set-up-dev ## the full development environment in .venv

.PHONY: clean
clean: ## remove what the demo, the tests and the tools wrote (.venv stays)
	rm -rf demo-output test-output build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	find . -path './.venv*' -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

.PHONY: help
help: ## this list
	@awk 'BEGIN {FS = ":.*## "} /^##@ / {printf "\n%s\n", substr($$0, 5)} \
		/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

# Tests get a home of their own with a short path (it holds sockets), and nothing of theirs stays behind.
pytest = home=$$(mktemp -d -t labkit-test-XXXXXX); failed=0; \
	LABKIT_TEST_HOME="$$home" $(BIN)/python -m pytest --durations=20 $(1) $(PYTEST_ARGS) || failed=$$?; \
	for own in "$$home" "$$home"/gw*; do \
		[ ! -d "$$own" ] || LABKIT_HOME="$$own" $(BIN)/labkit stop --all >/dev/null || failed=1; \
	done; \
	rm -rf "$$home"; \
	exit $$failed

# Whoever stands in one file stays together: the runs that its tests compare with are made once.
SIDE_BY_SIDE = -n $(PYTEST_WORKERS) --maxprocesses=4 --dist=loadfile

# What another torch may break.
TORCH_TESTS := tests/training/test_layouts.py tests/training/test_own_models.py tests/parallel tests/quantization \
	tests/launch/test_own_methods.py tests/pretended

# The pinned versions, with another torch in their place if one was asked for.
CONSTRAINTS := $(if $(TORCH),$(VENV)/constraints.txt,constraints.txt)
$(VENV)/constraints.txt: constraints.txt | $(VENV)/bin/python
	@{ grep -vE '^(torch|setuptools|triton|nvidia-[a-z0-9-]+|cuda-[a-z]+)==' constraints.txt; echo "torch==$(TORCH)"; } > $@

# A stamp per set-up: pip runs again only when what is to be installed has changed.
$(VENV)/.set-up-lab: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	@echo "Installing labkit and JupyterLab into $(VENV); this takes some minutes."
	@$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c $(CONSTRAINTS) -e '.[lab]'
	@touch $@

$(VENV)/.set-up-dev: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	@echo "Installing labkit with all its extras into $(VENV); this takes some minutes."
	@$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c $(CONSTRAINTS) -e '.[lab,hub,gpu,dev]'
	@touch $@ $(VENV)/.set-up-lab

$(VENV)/bin/python:
	@$(find_python); python=$$(find_python); echo "Making $(VENV) with $$("$$python" --version)"; "$$python" -m venv $(VENV)
