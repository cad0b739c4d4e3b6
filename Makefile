# make train   set up what is missing and run the default job
# make test    set up what is missing, check style and types, run the tests
# make docs    build the documentation into site/
# make capabilities   run the laws and write what they show of each method to docs/capabilities.md

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
ARGS   ?=

.PHONY: train test lint docs capabilities clean

train: $(VENV)/.installed
	$(BIN)/rankshift train $(ARGS)

test: $(VENV)/.tested lint
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

capabilities: $(VENV)/.tested
	$(BIN)/python -m pytest tests/laws --ignore tests/laws/test_capabilities.py --capabilities docs/capabilities.md $(ARGS)

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed: $(VENV)/.venv pyproject.toml constraints.txt
	scripts/install_torch $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test,dev]"
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) build dist site .mypy_cache .pytest_cache .ruff_cache
