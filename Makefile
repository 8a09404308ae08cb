# Every target sets itself up on a fresh machine: an environment in .venv, pinned by constraints.txt, and the native build.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: setup demo test test-all fast check lint format face docs ptx bench gpu real clean

# A compiler that comes later is noticed: the native kernels are then built.
READY := $(VENV)/.ready$(if $(shell command -v $(CXX)),,-without-a-compiler)

setup: $(READY)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone, so that no later package replaces this build. --no-compile: a module is compiled when it is
# first imported, and most of these packages' modules never are (two minutes of setup).
$(VENV)/.installed: constraints.txt pyproject.toml | $(VENV)/bin/python
	$(PIP) install -q --no-compile -c constraints.txt torch
	$(PIP) install -q --no-compile -c constraints.txt triton numpy pybind11 setuptools wheel
	$(PIP) install -q --no-compile -c constraints.txt pytest pytest-xdist hypothesis ruff mypy clang-format typos
	$(PIP) install -q --no-compile -c constraints.txt bitsandbytes matplotlib rich
	$(PIP) install -q --no-compile -c constraints.txt diffusers transformers accelerate peft safetensors pillow tokenizers
	touch $@

$(READY): $(VENV)/.installed setup.py $(wildcard csrc/*)
	$(PIP) install -q --no-build-isolation --no-deps -e .
	@$(BIN)/python -m pcs_kernels | sed -n 1p
	touch $@

# Four photos, four methods, one report: out/demo/report.html
demo: setup
	$(BIN)/python -m pcs_trainer demo

# One process a core, each with its half of the files at first: threads inside them would only get in each other's way.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n auto --dist worksteal

test: setup
	$(PYTEST) --durations=15

# Every method, dtype, shape and card, where `make test` runs one case of each path: before a release.
test-all: setup
	PCS_EVERY_CASE=1 $(PYTEST) --durations=15

# Before a commit, in two minutes: lint, types and the tests that take less than about a second.
check: lint fast

fast: setup
	$(PYTEST) -m "not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror csrc/*
	$(BIN)/typos
	$(BIN)/python tests/house_rules.py
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*

# The public names for editors: python/pcs_trainer/__init__.pyi
face: setup
	$(BIN)/python tests/face.py

# Pages made from the code: docs/methods.md, docs/api/
docs: setup
	$(BIN)/python docs/generate.py

# Every case's compiled kernels executed from their PTX, for five architectures: tests/ptx/README.md. An hour.
ptx: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.ptx --page
	$(BIN)/python benchmarks/roofline.py --save

# Ops, training steps, LAG, memory and quality, compared with peers; then the README's tables, docs pages and figures.
# About half an hour on two cores.
# torchao, a peer of one op, stays apart: transformers would load it wherever it finds it.
bench: setup
	$(PIP) install -q --no-compile -c constraints.txt --no-deps --upgrade --target $(VENV)/peers torchao
	PYTHONPATH=$(VENV)/peers $(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/step.py --size 512 --rounds 2 --no-compile
	$(BIN)/python benchmarks/step_methods.py --rounds 2
	$(BIN)/python benchmarks/lag.py --rounds 3
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/memory.py --docs
	$(BIN)/python -m benchmarks.quality --minutes 8
	$(BIN)/python -m benchmarks.quality --docs
	$(BIN)/python benchmarks/plot.py

# Everything on an NVIDIA GPU: probe, tests, commands, steps, ops, methods, in that order, into out/gpu. It installs
# nothing: a machine without network runs it with its own torch, triton, numpy and pytest. GPU="--minutes 9" and the like.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu $(GPU)

# Every method by the command line on Stable Diffusion 1.5's true shapes, random weights: two hours on two cores.
real: setup
	$(BIN)/python -m benchmarks.real

clean:
	rm -rf build dist *.egg-info pcs_kernels/*.so
