# What a developer does with Holdfast; needs make and Python 3.11 or newer, nothing else.

# The first interpreter that is new enough; `make PYTHON=/path/to/python run` names another.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
DATA ?= data
ARGS ?=
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SERVE := $(BIN)/holdfast serve --data-dir $(DATA) $(ARGS)

# Each takes the next part of what is left. More at a time would hurt the tests that measure who waits for whom.
SIDE_BY_SIDE := --numprocesses auto --maxprocesses 4 --dist worksteal
# The tests start hundreds of processes, each of which would compile the whole package.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help run test check format crash bench clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

# On a terminal the daemon gets a process group of its own, so that ctrl-C reaches it alone and make sees its exit 0.
run: .venv/.run  ## install into .venv, start the daemon on ./data, stop with ctrl-C
	@if [ -t 0 ] && [ -t 1 ]; then set -m; $(SERVE); else \
		echo "Serving $(DATA). From another terminal:"; \
		echo '  curl -H "Authorization: Bearer $$(cat $(DATA)/token)" http://127.0.0.1:8765/v1/sessions'; \
		echo "  curl --unix-socket $(DATA)/holdfast.sock http://localhost/v1/sessions"; \
		exec $(SERVE); fi

test: .venv/.test  ## run the tests; ARGS="tests/test_x.py -k name" for some of them
	@$(BIN)/python -m pytest $(if $(ARGS),$(ARGS),$(SIDE_BY_SIDE))

check: .venv/.dev  ## lint, formatting, types, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/test_layers.py

format: .venv/.dev  ## let ruff lay out the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

crash: .venv/.test  ## the long fault tests (kills, power cuts, broken disks)
	HOLDFAST_CRASH=full $(BIN)/python -m pytest -m crash --timeout 3600 $(ARGS)

bench: .venv/.bench  ## measure beside redis-server and others, in one run
	@$(BIN)/python -m tests.bench $(ARGS)

clean:  ## remove .venv and caches, never data
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/.made:
	@test -n "$(PYTHON)" || { echo "Holdfast needs Python 3.11 or newer: install it, or name it with make PYTHON=..." >&2; exit 1; }
	@echo "Installing into .venv with $(PYTHON) (the first time only)"
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/.run: .venv/.made pyproject.toml constraints.txt
	@$(INSTALL) --editable .
	@touch $@

.venv/.test .venv/.dev .venv/.bench: .venv/.%: .venv/.made pyproject.toml constraints.txt
	@$(INSTALL) --editable ".[$*]"
	@touch $@ .venv/.run
