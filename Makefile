# Targets run in .venv, which is created on first use and again when a lock changes.
PYTHON ?= python3
TORCH ?= auto
DATA_DIR ?= data
ARGS ?=

python := .venv/bin/python
parallel := $(python) -m pytest -n auto --maxprocesses 4 --dist worksteal
installed := .venv/.installed-$(TORCH)-$(notdir $(PYTHON))
lm_eval_installed := .venv-lm-eval/.installed-$(TORCH)-$(notdir $(PYTHON))
cluster_installed := .venv-cluster/.installed-$(TORCH)-$(notdir $(PYTHON))
trackers_installed := .venv-trackers/.installed-$(TORCH)-$(notdir $(PYTHON))
sky_installed := .venv-sky/.installed-$(notdir $(PYTHON))
other_locks := lock-dev.txt lock-lm-eval.txt lock-cluster.txt lock-sky.txt lock-trackers.txt
locks := $(filter-out $(other_locks:%=requirements/%),$(wildcard requirements/*.txt))

.PHONY: help install demo test test-all test-containers test-browser test-lm-eval test-cluster test-sky test-trackers check soak lock format clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo 'Variables: PYTHON=python3.12, TORCH=auto|cpu|cuda, ARGS="pytest arguments"'

install: $(installed) ## Create .venv with the locked packages

demo: export RECIPE = demo
demo: $(installed) ## Prepare text, train a small GPT on this machine's CPU and report on it, in minutes
	$(python) -m app prepare
	$(python) -m app train
	$(python) -m app sample
	$(python) -m app report
	@echo "Done. The report: $(DATA_DIR)/runs/demo/report/report.html and .png"

test: $(installed) ## Run the tests that take no more than a few seconds each, in parallel
	@$(parallel) -m 'not (slow or soak or container or browser or lm_eval or cluster or sky or trackers)' $(ARGS)

test-all: $(installed) ## Run the slow ones as well
	@$(parallel) $(ARGS)

test-containers: $(installed) ## Build the images and test them on this machine's container engine
	@$(python) -m pytest -m container tests/containers $(ARGS)

test-browser: $(installed) ## Test the pages in this machine's Chromium
	@$(python) -m pytest -m browser $(ARGS)

test-lm-eval: $(installed) $(lm_eval_installed) ## Score an exported model with lm-eval, without a network
	@$(python) -m pytest -m lm_eval tests/tools/test_lm_eval.py $(ARGS)

test-cluster: $(installed) $(cluster_installed) ## Test preparing in tasks with Ray and datatrove on this machine, including kills
	@$(python) -m pytest -m cluster tests/cluster $(ARGS)

test-sky: $(installed) $(sky_installed) ## Check cloud/sky.yaml with SkyPilot's own parsers, without a network
	@$(python) -m pytest -m sky tests/test_sky.py $(ARGS)

test-trackers: $(installed) $(trackers_installed) ## Test Trackio and Weights & Biases, without a network
	@$(python) -m pytest -m trackers tests/runs/test_trackers.py $(ARGS)

soak: $(installed) ## Run the long tests: kills, restarts, full disks
	@$(python) -m pytest -m soak $(ARGS)

check: $(installed) ## Check lint, formatting, types, layers, image, workflow and locks
	$(python) -m ruff check
	$(python) -m ruff format --check
	$(python) -m mypy
	$(python) -m mypy --platform darwin --cache-dir .mypy_cache/darwin app
	.venv/bin/lint-imports
	[ ! -x .venv/bin/shellcheck ] || .venv/bin/shellcheck .ci/run benchmarks/*.sh cloud/*.s* docker/*.sh requirements/*.sh
	.venv/bin/hadolint docker/Dockerfile
	.venv/bin/zizmor --quiet --offline --pedantic .github
	$(python) requirements/lock.py --check

format: $(installed) ## Format, and fix lint where possible
	$(python) -m ruff check --fix
	$(python) -m ruff format

lock: $(installed) ## Lock the requirements of pyproject.toml (newest versions: ARGS=--upgrade)
	$(python) requirements/lock.py $(ARGS)

clean: ## Remove environments and caches, but no data
	rm -rf .venv .venv-cluster .venv-lm-eval .venv-sky .venv-trackers .*_cache .hypothesis build dist *.egg-info
	find app tests requirements benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

$(installed): $(locks) requirements/lock-dev.txt requirements/install.sh
	@requirements/install.sh "$(PYTHON)" "$(TORCH)" .venv lock.txt lock-dev.txt vocabulary.txt
	@# uv compiles no bytecode; without it each start takes seconds longer. The tests use little of transformers.
	@$(python) -m compileall -q -j 0 -x /transformers/ .venv/lib >/dev/null || true
	@touch $@

$(lm_eval_installed): $(wildcard requirements/torch*) requirements/lock-lm-eval.txt requirements/install.sh
	@requirements/install.sh "$(PYTHON)" "$(TORCH)" .venv-lm-eval lock-lm-eval.txt
	@touch $@

$(cluster_installed): $(wildcard requirements/torch*) requirements/lock-cluster.txt requirements/vocabulary.txt requirements/install.sh
	@requirements/install.sh "$(PYTHON)" "$(TORCH)" .venv-cluster lock-cluster.txt vocabulary.txt
	@touch $@

$(trackers_installed): $(wildcard requirements/torch*) requirements/lock-trackers.txt requirements/vocabulary.txt requirements/install.sh
	@requirements/install.sh "$(PYTHON)" "$(TORCH)" .venv-trackers lock-trackers.txt vocabulary.txt
	@touch $@

$(sky_installed): requirements/lock-sky.txt requirements/install.sh
	@requirements/install.sh "$(PYTHON)" none .venv-sky lock-sky.txt
	@touch $@
