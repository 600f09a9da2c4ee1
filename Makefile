# Everything runs in .venv, which is made when it is missing or when the dependencies changed.
PYTHON ?= python3
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## train on handwritten digits, classify held-out ones, draw where the model looked (a minute)
	@.venv/bin/python -m benchmarks.digits

test: $(INSTALLED)  ## run the tests (5 to 9 minutes)
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)  ## check style and types
	@.venv/bin/ruff check
	@.venv/bin/ruff format --check
	@.venv/bin/pyright

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "$(PYTHON) is Python %d.%d; 3.11 or newer is needed: make PYTHON=python3.11 ..." % sys.version_info[:2])'
	@echo "Installing into .venv: about two minutes and 7.3 GB"
	@$(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install -q -c constraints.txt -e '.[dev]' >.venv/install.log 2>&1 \
		|| { cat .venv/install.log; exit 1; }
	@touch $@
