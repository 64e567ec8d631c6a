# The words a newcomer types. `make help` lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DATA ?= movielens
DIR ?=
DATE ?=
ARGS ?=
# Processes that run the tests; each may take 2 GB.
WORKERS ?= 2
UV_VERSION := 0.13.9
# uv does not read pip's configuration; hand over where pip would look for wheels and indexes.
PIP_SETTING = $(shell $(PYTHON) -m pip config get $(1) 2>/dev/null)
FIND_LINKS = $(or $(PIP_FIND_LINKS),$(call PIP_SETTING,global.find-links))
INDEX_URL = $(or $(PIP_INDEX_URL),$(call PIP_SETTING,global.index-url))

.DEFAULT_GOAL := help
.PHONY: help install lock demo dev test test-integration check format bench-reading bench-load bench-train bench-strategies bench-compress bench-planner bench-serving-plan bench-movielens bench-drift backtest screenshots clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(READY) ## Create the environment in .venv from the lock

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "recflow needs Python 3.11 or newer; say which: make PYTHON=python3.11 install" >&2; exit 1; }
	@echo "Installing the locked packages into $(VENV) (about 1.5 GB, from the package index)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@UV_FIND_LINKS="$(FIND_LINKS)" $(if $(INDEX_URL),UV_DEFAULT_INDEX="$(INDEX_URL)") \
		$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint requirements.lock --editable '.[dev]'
	@touch $@

lock: ## Resolve the newest allowed versions into requirements.lock
	@test -x $(BIN)/uv || { $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet uv==$(UV_VERSION); }
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --all-extras pyproject.toml --output-file requirements.lock

demo: $(READY) ## Raw logs to report; DATA=movielens|simulated|mind|ebnerd DIR=logs DATE=last-day
	@$(BIN)/recflow demo --data "$(DATA)" $(if $(DIR),--dir "$(DIR)") $(if $(DATE),--date "$(DATE)")

dev: $(READY) ## Open Dagster's web UI on what `make demo` materialised (same DATA=)
	@$(BIN)/recflow dev --data "$(DATA)"

test: $(READY) ## Run the tests (minutes, on 2 cores)
	$(BIN)/python -m pytest -m "not integration" -n $(WORKERS) --dist loadfile

test-integration: $(READY) ## Run the whole lineage in real processes, kills included
	$(BIN)/python -m pytest -m integration

check: $(READY) ## Lint, format check, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(READY) ## Format the code and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-reading: $(READY) ## Rows/s and peak memory of log reading against pandas
	$(BIN)/python -m recflow_tests.benchmarks.reading

bench-load: $(READY) ## Seconds to load the code location
	$(BIN)/python -m recflow_tests.benchmarks.location_load

bench-train: $(READY) ## Training the textbook's way against ours, technique by technique (DATA=simulated)
	$(BIN)/python -m recflow_tests.benchmarks.training $(if $(filter command line,$(origin DATA)),--data "$(DATA)")

bench-strategies: $(READY) ## Compare all fine-tuning strategies on what `make demo` prepared (same DATA=)
	$(BIN)/python -m recflow_tests.benchmarks.strategies "$(DATA)"

bench-compress: $(READY) ## Compressed models against other runtimes, on what `make demo` prepared (same DATA=)
	$(BIN)/python -m recflow_tests.benchmarks.compression --data "$(DATA)"

bench-planner: $(READY) ## Memory and time of trainings, predicted beside measured (after make demo DATA=simulated)
	$(BIN)/python -m recflow_tests.benchmarks.planner

bench-serving-plan: $(READY) ## What serving takes, predicted beside measured, on what `make demo` stored (same DATA=)
	$(BIN)/python -m recflow_tests.benchmarks.serving_plan --data "$(DATA)"

bench-movielens: $(READY) ## MovieLens-100K by the field's protocols (needs `make demo` once)
	$(BIN)/python -m recflow_tests.benchmarks.movielens

bench-drift: $(READY) ## False alarms of drift, and which shifts it finds (DIR=EB-NeRD adds its days)
	$(BIN)/python -m recflow_tests.benchmarks.drift $(if $(DIR),--ebnerd "$(DIR)")

backtest: $(READY) ## Never, nightly or on drift: walk simulated days (about 20 min), or DATA=ebnerd DIR=logs
	@$(BIN)/recflow backtest $(if $(DIR),--data "$(DATA)" --dir "$(DIR)") $(ARGS)

screenshots: $(READY) ## Take the README's screenshots again (needs Chromium)
	$(BIN)/python docs/screenshots.py

clean: ## Remove everything that was materialised (keeps downloads and the environment)
	rm -rf .recflow
