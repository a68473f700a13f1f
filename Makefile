# Every target sets up what it needs: `make demo` and `make test` work in a fresh clone.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
INSTALL := $(RUN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint docs gpu clean

help:
	@echo "make demo    train a Dynamic Group Transformer on real handwritten digits, and write its report"
	@echo "make test    every test that runs on this machine"
	@echo "make lint    ruff, type checker, floors"
	@echo "make docs    the documentation site, in site/"
	@echo "make gpu     GPU tests and benchmarks, with the torch that is installed"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable ".[train]"
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable ".[test]"
	@touch $@ $(VENV)/.train

$(VENV)/.docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable ".[docs]"
	@touch $@

demo: $(VENV)/.train
	$(RUN)/coterie train --config recipes/digits.yaml
	$(RUN)/coterie inspect runs/digits
	@echo "Look at runs/digits/report.html and runs/digits/inspect/index.html"

test: $(VENV)/.test lint
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest tests -n auto

lint: $(VENV)/.test
	$(RUN)/ruff check src tests benchmarks
	$(RUN)/ruff format --check src tests benchmarks
	$(RUN)/mypy
	$(RUN)/lint-imports

docs: $(VENV)/.docs
	$(RUN)/mkdocs build --strict

# Runs with the interpreter's own packages (torch, triton, timm), not with a virtual environment: a GPU machine has its builds.
gpu:
	PYTHONPATH=src $(PYTHON) -m pytest -p no:cacheprovider -q tests/gpu
	mkdir -p bench_results
	PYTHONPATH=src $(PYTHON) -m coterie bench op dynamic_group --device cuda --dtype bfloat16 --heads 8 --head-dim 64 \
	    --tokens 3136 12544 50176 --backward --output bench_results/op-gpu
	for heads in 16 32; do for dim in 64 128; do \
	    PYTHONPATH=src $(PYTHON) -m coterie bench op composable --device cuda --dtype bfloat16 --heads $$heads --head-dim $$dim \
	        --tokens 2048 4096 8192 16384 --forward --backward --backends triton --output bench_results/op-gpu || exit 1; \
	done; done
	PYTHONPATH=src $(PYTHON) -m coterie bench model dgt_tiny swin_tiny_patch4_window7_224 --device cuda --dtype bfloat16 \
	    --size 224 1024 --batch 8 --output bench_results/model-gpu

clean:
	rm -rf $(VENV) site build dist bench_results .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
