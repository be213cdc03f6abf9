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

# One thread a process: the tests' sizes gain nothing from more, and threads that wait for a busy core cost much.
test: $(VENV)/.installed
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest tests

# On a machine whose Python has torch and pytest already, and no network: make test-gpu GPU_PYTHON=python3
GPU_PYTHON ?= $(BIN)/python

test-gpu:
	$(GPU_PYTHON) -m pytest tests -m gpu

bench-gpu:
	for dtype in fp32 bf16; do $(GPU_PYTHON) -m bench step --device cuda --batch 128 --dtype $$dtype || exit 1; done
	$(GPU_PYTHON) -m bench kmeans

lint:
	ruff check . && ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info
