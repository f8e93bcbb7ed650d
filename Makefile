# make demo      install, then run the whole pipeline on real images
# make demo-text install, then run the whole pipeline with a language model on text
# make test      install with the test extras, then run the tests (CI runs it)
# make test-gpu tests on a GPU (docs/gpu.md has results). DEVICE=cpu: at toy size, on the CPU
# make test-full only the long tests; DATA=folder of the CIFAR-100 image tree for the CIFAR proof
# make test-extras trackers against the real W&B and MLflow, pages in a real Chromium; in .venv-extras (CI runs it too)
# make fuzz      odd values of every option and recipe key, for SECONDS from the seed SEED; prints what fails
# make test-slurm runs on a real Slurm on this machine, 20 of them with faults (docs/reliability.md); run again, it resumes
# make test-faults all trials of every fault, then docs/reliability.md; run again, it resumes. MINUTES: limit per scenario
SHELL := /bin/bash
.SHELLFLAGS := -e -o pipefail -c
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := .venv-extras
RUN ?= runs/digits
JOBS ?= 2
TEST_JOBS ?= 2
MINUTES ?= 60
SECONDS ?= 3600
SEED ?= 1000000

.PHONY: demo demo-text test test-gpu test-full fuzz test-slurm test-faults test-extras lint format clean

# one thread per process on every machine: the layout that the README's numbers come from
demo: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/bigincubate run digits --run-dir $(RUN) --jobs $(JOBS)

demo-text: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/bigincubate run stdlib-llama --run-dir runs/stdlib --jobs $(JOBS)

test: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest -m "not full and not faults and not slurm and not gpu and not extras" -n $(TEST_JOBS) --dist loadfile

test-gpu: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/gpu $(if $(DEVICE),--device $(DEVICE))

test-full: $(VENV)/.installed-dev
	BIGINCUBATE_CIFAR100="$(DATA)" $(BIN)/python -m pytest -m full

test-extras: $(VENV)/.installed-dev $(EXTRAS)/.installed
	PYTHONPATH=. TRAINING_PYTHON=$(abspath $(BIN))/python $(EXTRAS)/bin/python -m pytest -m extras tests/extras

fuzz: $(VENV)/.installed-dev
	FUZZ_SECONDS=$(SECONDS) FUZZ_SEED=$(SEED) $(BIN)/python -m pytest -q -s tests/integration/test_fuzz.py -k random_round

test-faults: $(VENV)/.installed-dev
	FAULTS=full FAULTS_MINUTES=$(MINUTES) $(BIN)/python -m pytest tests/faults

test-slurm: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slurm
	FAULTS=full FAULTS_MINUTES=$(MINUTES) $(BIN)/python -m pytest tests/faults/test_cluster.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# the same versions for users, developers and CI: constraints.txt is what the tests passed with
# uv installs faster and shows what it does; pip's output is shortened to the packages that it downloads
UV := $(shell command -v uv)
PROGRESS := sed -u -n -e 's/^ *\(Downloading\|Using cached\) /  /p' -e 's/^Installing collected .*/  installing/p'
PIP_INSTALL = $(if $(UV),$(UV) pip install --python $(BIN)/python,$(BIN)/python -m pip install --no-color)
SHORTEN = $(if $(UV),,| $(PROGRESS))

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "bigincubate needs Python 3.11 or newer: make PYTHON=python3.12")'
	@echo "creating a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml setup.py constraints.txt
	@echo "installing bigincubate and its dependencies: 6 GB, mostly torch, in 2 to 5 minutes"
	@$(PIP_INSTALL) --constraint constraints.txt --editable '.[report]' $(SHORTEN)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing what the tests need: DeepSpeed, fairscale, pytest, linters, mkdocs; about a minute"
	@$(PIP_INSTALL) --constraint constraints.txt --editable '.[dev]' $(SHORTEN)
	@touch $@

# programs that bigincubate does not depend on, in their newest versions, without torch
$(EXTRAS)/.installed: tests/extras/requirements.txt
	@$(PYTHON) -m venv $(EXTRAS)
	@echo "installing W&B, MLflow and Playwright in $(EXTRAS), in one to three minutes"
	@$(EXTRAS)/bin/python -m pip install --no-color --requirement $< | $(PROGRESS)
	@touch $@

clean:
	rm -rf $(VENV) $(EXTRAS) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
