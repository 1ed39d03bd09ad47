# `make help` lists the targets. Everything runs in .venv, which is made on first use from constraints.txt.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The exact versions of constraints.txt need Python 3.11 or newer.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Named exactly and first: an unpinned torch would come with gigabytes of CUDA packages where a CPU build is offered.
TORCH := $(shell grep '^torch==' constraints.txt)
# Files of tests side by side, in the order of their names: those that start ranks, which take longest, come first.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help venv remove-moved demo docs test test-fast test-te soak compare lint format image-ngc image-cpu clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

venv: $(STAMP)  ## make or update the environment

# An environment names its directory in its commands, and this one as the package's: one that has come here with a
# moved or copied clone is made anew. One that is linked from another clone serves as it is.
MADE_IN := $(shell cat $(STAMP) 2>/dev/null)
ifneq ($(MADE_IN),$(if $(MADE_IN),$(shell cd ./$(VENV) && pwd -P)))
MOVED := remove-moved
remove-moved:
	$(info $(VENV) was made as $(MADE_IN): it is made anew)
	rm -rf $(VENV)
endif

# The environment is up to date when it is newer than what describes it.
$(STAMP): setup.py constraints.txt $(MOVED)
	@test -x $(BIN)/python || { test -n "$(PYTHON)" && \
		"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, found '$(PYTHON)': give one with make PYTHON=..."; exit 1; }; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt '$(TORCH)'
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	@cd ./$(VENV) && pwd -P > $(notdir $(STAMP))

demo: $(STAMP)  ## tiny model and data, TP2 x PP2 DPO on CPU with four ranks, export, before/after table
	$(BIN)/python tools/make_demo.py run

docs: $(STAMP)  ## docs/configuration.md from the schema, and all pages as a site in build/site
	$(BIN)/python tools/docs/configuration.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test: lint  ## lint, types and the whole test suite
	$(PYTEST)

test-fast: lint  ## lint, types and the unit tests
	$(PYTEST) tests/unit

test-te:  ## signatures and FP8 recipes of a real Transformer Engine; needs Python 3.12 and a CUDA toolkit, no GPU
	sh tests/te/install.sh .venv-te
	.venv-te/bin/python -m pytest tests/te

soak: $(STAMP)  ## kill a tiny training 200 times, resume it, compare; SOAK='--cycles 20 --seed 1' for others
	$(BIN)/python -m tests.soak $(SOAK)

compare: $(STAMP)  ## compare every number of tiny runs at two commits: BASE=COMMIT [HEAD=COMMIT], else with what is here
	$(BIN)/python -m tests.compare_commits $(BASE) $(HEAD)

lint: $(STAMP)  ## ruff, mypy, shellcheck and hadolint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck .ci/run docker/*.sh docker/slurm/*.sbatch tests/fixtures/*.sh tests/te/*.sh
	$(BIN)/hadolint docker/*.Dockerfile

format: $(STAMP)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

image-ngc:  ## the image for NVIDIA GPUs, on the base of docker/pins.env; needs Docker and a network
	docker/build.sh ngc

image-cpu:  ## the image for CPU; needs Docker and a network
	docker/build.sh cpu

clean:  ## remove caches and build output; .venv, .venv-te and outputs stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find conf megadpo tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
