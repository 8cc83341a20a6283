# A user: make up, make test. Everything runs out of .venv; PYTHON=… makes it of another Python (3.11 or newer).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt
ARGS ?=
PART ?=
ENV_FILE ?= .env
SEEDS ?= 2000
FAST := not model and not slow and not e2e
IN_TWO := -n 2 --dist loadfile# tests/conftest.py says what stays together; ARGS="-n 0" for one process

.DEFAULT_GOAL := help
.PHONY: help up test test-fast check format bench simulate clean up-compose down-compose test-compose

help: ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

up: $(VENV)/.runtime ## install, get the model, start everything; ARGS="--prefill 2 --decode 2" passes flags on
	@exec $(BIN)/splitserve serve $(ARGS)

up-compose: ## the same in containers (docker-compose.yml): writes .env, builds, starts, waits; ENV_FILE=.env.second for a second stack
	@ENV_FILE=$(ENV_FILE) compose/stack.sh up

down-compose: ## stop the containers; VOLUMES=1 removes models and metrics too
	@ENV_FILE=$(ENV_FILE) VOLUMES=$(VOLUMES) compose/stack.sh down

test: check ## the whole suite; containers aside, which are test-compose
	$(BIN)/python -m pytest $(IN_TWO) -m "not compose" $(ARGS)

test-fast: $(VENV)/.dev ## what needs no model and no cluster
	$(BIN)/python -m pytest $(IN_TWO) -m "$(FAST)" $(ARGS)

test-compose: $(VENV)/.dev ## the stack of docker-compose.yml, run for real; skipped where no Docker engine answers
	$(BIN)/python -m pytest tests/compose -rs $(ARGS)

check: $(VENV)/.dev ## ruff, format, import contracts, types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/pyright

format: $(VENV)/.dev ## let ruff mend and format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

simulate: $(VENV)/.dev ## a whole cluster under a virtual clock and faults; SEEDS=100000, or SEED=1234 to replay one
	PYTHONPATH=services:shared:tests $(BIN)/python -m simulation $(if $(SEED),--replay $(SEED),--seeds $(SEEDS)) $(ARGS)

bench: $(VENV)/.dev ## measure all parts, or PART=serving, engine_cpu, router, …, and write docs/benchmarks.md; ARGS are the part's own
	PYTHONPATH=services:shared:tests:benchmarks $(BIN)/python -m bench $(PART) $(ARGS)

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "splitserve needs Python 3.11 or newer; PYTHON=… names one" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --quiet --progress-bar on --editable .
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --quiet --progress-bar on --editable '.[dev]'
	@touch $(VENV)/.runtime $@
