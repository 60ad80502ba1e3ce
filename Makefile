# `make demo` and `make test` are all that a new machine needs; `make check` before a commit.
#
#   PYTHON   the interpreter that makes the virtual environment (3.11 or newer)   [python3]
#   VENV     where the environment lives; your own works too                      [.venv]
#   SETUP    none: take the environment as it is, install nothing
#   DEMO     where the demo run is written                                        [runs/demo]
#   PYTEST   further arguments for pytest, for example PYTEST='-k resume -x'

PYTHON ?= python3
VENV   ?= .venv
DEMO   ?= runs/demo
PYTEST ?=

BIN := $(VENV)/bin
SETUP_FAILED := { echo "Set-up failed. It wants Python 3.11 or newer with venv (now: $(PYTHON)), a package index, and about" \
	"6 GB of disk (PyTorch for CUDA). Mend what is missing and run the command again, or use an environment" \
	"that has the packages already: make VENV=/path/to/venv SETUP=none ..."; exit 1; } >&2
CHECKS := tests/test_layers.py tests/test_budget.py tests/test_docs.py

.DEFAULT_GOAL := help
.PHONY: help demo test check format lock clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/installed  ## set up, then train on real images in one to three minutes
	@$(BIN)/python -m opsin train quickstart --out $(DEMO) --fresh
	@echo "Everything of this run is in $(DEMO). Your own pictures next: see README.md"

test: $(VENV)/installed-dev  ## set up, then run all tests
	@$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal $(PYTEST)

check: $(VENV)/installed-dev  ## format, lint, types, layers, budgets, documentation
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q $(CHECKS)

format: $(VENV)/installed-dev  ## rewrite the code in the house format
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format .

# Device libraries stay out of the file, so that builds of PyTorch for the CPU or another CUDA fit it too.
lock: $(VENV)/installed-dev  ## renew constraints.txt with the newest versions
	@$(BIN)/pip install -qq uv
	@$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --upgrade \
		--no-header --no-annotate --quiet | grep -vE '^(cuda-|nvidia-|triton)' > constraints.new
	@mv constraints.new constraints.txt

clean:  ## remove the environment and all caches; runs stay
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

# --- set-up: repeated only when what is to be installed changes ---------------------------------

ifeq ($(SETUP),none)
export PYTHONPATH := src
.PHONY: $(VENV)/installed $(VENV)/installed-dev
$(VENV)/installed $(VENV)/installed-dev: ;
else
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || $(SETUP_FAILED)
	@$(PYTHON) -m venv $(VENV) || $(SETUP_FAILED)

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Setting up $(VENV); the first time this takes some minutes."
	@$(BIN)/pip install -qq -c constraints.txt -e . || $(SETUP_FAILED)
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@$(BIN)/pip install -qq -c constraints.txt -e '.[dev]' || $(SETUP_FAILED)
	@touch $@
endif
