# Needs python3 (3.11 to 3.13) and make; everything else goes into .venv, from the package index.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# pyright runs on the node that came with it, not on whatever node the machine has.
export PYRIGHT_PYTHON_GLOBAL_NODE := 0
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: help demo results docs check test compare lint types pytest

help:
	@echo "make demo   install into .venv and run a small study: verdicts, table, figure and page"
	@echo "make results  make the reports of the studies in docs/results anew from their rows"
	@echo "make docs   build the documentation site into site/; warnings are errors"
	@echo "make check  install all extras into .venv and run ruff, pyright and the quick tests"
	@echo "make test   the same with every test"
	@echo "make compare OLD=rev NEW=rev  train small runs with two commits and compare every bit"

demo: .venv/installed
	$(BIN)/cerl sweep demo --jobs 2 --out runs/demo

results: .venv/installed-all
	PYTHONPATH=$(CURDIR) $(BIN)/python -m tests.remake

docs: .venv/installed-docs
	$(BIN)/zensical build --strict --clean
	@echo "site/index.html opens in a browser; its search needs a server: $(BIN)/python -m http.server -d site"

# pyright works on one core, so it runs beside the tests.
check: .venv/installed-all
	@$(MAKE) --no-print-directory --jobs 3 lint types pytest PYTEST='-m "not slow and not gpu"'

test: .venv/installed-all
	@$(MAKE) --no-print-directory --jobs 3 lint types pytest

compare: .venv/installed-all
	PYTHONPATH=$(CURDIR) $(BIN)/python -m tests.curves compare $(OLD) $(NEW)

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .

types:
	$(BIN)/pyright --pythonpath $(BIN)/python

pytest:
	$(BIN)/python -m pytest -q -n auto --dist worksteal $(PYTEST)

.venv/installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) > /dev/null || { echo "error: no $(PYTHON) here; install Python 3.11 to 3.13, or make PYTHON=/path/to/python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { echo "error: cerl needs Python 3.11 to 3.13, and $(PYTHON) is $$($(PYTHON) --version 2>&1); try make PYTHON=python3.12 ..." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; echo "error: $(PYTHON) cannot make .venv; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	@echo "Installing into .venv (a CUDA build of torch is a download of 3 GB; see README.md)"
	$(PIP) install -c constraints.txt -e '.[page]'
	@touch $@

.venv/installed-all: .venv/installed
	$(PIP) install -c constraints.txt -e '.[atari,mujoco,dmc,popgym,docs,ray,test]'
	@touch $@

.venv/installed-docs: .venv/installed
	$(PIP) install -c constraints.txt -e '.[docs]'
	@touch $@
