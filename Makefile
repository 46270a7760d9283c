# Two commands do everything on a machine that has only Python: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: demo test check docs clean

demo: $(VENV)/.examples
	HF_HUB_DISABLE_TELEMETRY=1 $(BIN)/python -u examples/demo.py $(ARGS)

test: $(VENV)/.dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check

docs: $(VENV)/.dev
	$(BIN)/python docs/generate.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.examples: $(BIN)/python setup.cfg constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[examples]'
	touch $@

$(VENV)/.dev: $(BIN)/python setup.cfg constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info examples/.cache
