# Development tasks. `make help` lists them.

PYTHON ?= python3
PYTEST_ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PARTIAL := $(VENV)/.partial

# Figures are written to files, so no display is needed.
export MPLBACKEND ?= Agg
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test lint format docs clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-8s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## Make .venv with the package and its development tools (PYTHON=python3.12 picks another Python)

# A .venv that cannot be used (its Python gone or too old) or whose making was interrupted is made
# anew: pip takes a package that was half written for an installed one. One that only lacks the
# stamp, or whose stamp is older than the requirements, is completed.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed: make PYTHON=/path/to/python" if sys.version_info < (3, 10) else 0)'
	@rm -f $@
	@if [ -e $(PARTIAL) ] || \
		! $(PY) -c 'import sys, pip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then \
		echo "Making $(VENV)"; \
		rm -rf $(VENV) && mkdir $(VENV) && touch $(PARTIAL) && $(PYTHON) -m venv $(VENV); \
	fi
	@touch $(PARTIAL)
	@echo "Installing into $(VENV)"
	@$(PY) -m pip install --quiet -c constraints.txt -e '.[dev]'
	@rm -f $(PARTIAL)
	@touch $@

demo: setup ## Fit a guide to sunspot counts and a density to a table; tables and pictures in outputs/
	$(PY) examples/svi_guide.py
	$(PY) examples/density_table.py

test: setup ## Run the tests (PYTEST_ARGS="-k name" passes options on)
	@$(PY) -m pytest -n auto --dist worksteal $(PYTEST_ARGS)

lint: setup ## Check style, format and types
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy pyro_snf

format: setup ## Fix what ruff can fix, and format
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

# -E reads every page again: a warning in an unchanged page must not be missed.
docs: setup ## Build the documentation into docs/_build/html, warnings being errors
	@$(PY) -m sphinx -q -E -W --keep-going -b html -d docs/_build/doctrees docs docs/_build/html
	@echo "Documentation: docs/_build/html/index.html"

clean: ## Remove build products and caches (not .venv, not outputs/)
	@rm -rf build dist *.egg-info docs/_build docs/generated docs/api/generated \
		.pytest_cache .mypy_cache .ruff_cache
	@find . -path ./$(VENV) -prune -o -path ./.git -prune -o -type d -name __pycache__ -exec rm -rf {} +
