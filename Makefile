# Two commands a new user needs: `make demo` and `make test`. Both make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-gpu bench-gpu lint clean

$(VENV)/.installed: pyproject.toml setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mapet needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[test,demo]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/mapet demo --output runs/demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest tests

lint:
	ruff check . && ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info
