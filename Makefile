# make distill   environment, compiled kernels, the whole distillation, and where its report is; a second time, it
#                goes on with the run in $(OUTPUT)
# make test      the same environment with the test extras, lint, types and the whole test suite
# make docs      the documentation into build/docs, every warning an error
#
# Overridable: PYTHON, VENV, TORCH (what pip installs first, for example TORCH="torch --index-url ..."),
# WHEEL (a built wheel to install instead of the checkout), ARGS (flags for python -m di4c_ext.distill).

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
WHEEL ?=
OUTPUT ?= runs/digits
ARGS ?=

PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
target = $(if $(WHEEL),"$(WHEEL)[$(1)]",-e ".[$(1)]")  # with the extras named
SOURCES = pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f) $(WHEEL)

# The installed package is what runs, never the folder we stand in.
export PYTHONSAFEPATH = 1
# Idle OpenMP threads sleep: spinning ones make a training step five times slower beside any other busy process.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: distill test lint docs clean

distill: $(VENV)/.all
	$(VENV)/bin/python -m di4c_ext.distill --output_dir $(OUTPUT) $(if $(wildcard $(OUTPUT)/distill_config.yaml),--resume) $(ARGS)

test: $(VENV)/.test lint
	$(VENV)/bin/pytest tests

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

docs: $(VENV)/.docs
	$(VENV)/bin/sphinx-build --fail-on-warning --keep-going -q -b html docs build/docs
	@echo "documentation: build/docs/index.html"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first and is pinned here: the package itself asks only for torch>=2.6.
$(VENV)/.torch: | $(VENV)/bin/python
	$(PIP) $(TORCH)
	touch $@

$(VENV)/.%: $(SOURCES) $(VENV)/.torch
	@echo "installing di4c_ext (compiling its kernels takes a minute or two, longer with CUDA)"
	$(PIP) $(call target,$*)
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info di4c_ext/_C*.so
