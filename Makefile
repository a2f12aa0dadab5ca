# Everything a newcomer needs: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart install test test-slow test-browser coverage lint docs dist clean

quickstart: $(VENV)/.installed
	$(BIN)/symphony-vlm quickstart --output runs/quickstart

install: $(VENV)/.installed-test

test: $(VENV)/.installed-test lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not slow and not browser"

test-slow: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m slow

# The screenshots stay in build/browser/.
test-browser: $(VENV)/.installed-test
	mkdir -p build
	$(BIN)/pytest -m browser --basetemp=build/browser

# Which lines the tests run, those of commands that they start too.
coverage: $(VENV)/.installed-test
	$(BIN)/python -m pip install -e '.[coverage]' -c constraints.txt
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not slow and not browser" --cov --cov-report=term --cov-report=html:build/coverage

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages and the reference as a site in build/site/. A warning is an error.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What is published: a wheel and all sources, checked as the package index checks them.
dist: $(VENV)/.installed
	$(BIN)/python -m pip install -e '.[release]' -c constraints.txt
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; ok = (3, 10) <= sys.version_info < (3, 13); sys.exit(0 if ok else "Python 3.10, 3.11 or 3.12 is needed, this is %s; run make PYTHON=python3.11 ..." % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -e . -c constraints.txt
	touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -e '.[test]' -c constraints.txt
	touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -e '.[docs]' -c constraints.txt
	touch $@ $(VENV)/.installed
