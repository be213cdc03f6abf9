# Two commands a new user needs: `make demo` and `make test`. Both make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-gpu bench-gpu bench-gpu-tokens lint clean

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
# (CONTRIBUTING.md, On a GPU machine). Each is meant to end within 10 minutes.
GPU_PYTHON ?= $(BIN)/python
GPU_TESTS = $(shell grep -l 'mark\.gpu' tests/test_*.py)
RESULTS ?= bench/results

# Only files with GPU tests are read, which need few packages. Most of the time goes into compiling kernels, so that it
# is spread over processes where pytest-xdist is installed.
test-gpu:
	spread=$$($(GPU_PYTHON) -c 'import xdist; print("-n 6")' 2>/dev/null); \
	OMP_NUM_THREADS=2 $(GPU_PYTHON) -m pytest $(GPU_TESTS) -m gpu -rs $$spread

# The attention suite stops by itself; what it has by then is its record. A suite that fails does not stop the next.
bench-gpu:
	status=0; \
	$(GPU_PYTHON) -m bench attention --device cuda --time-limit 360 --output $(RESULTS) || status=1; \
	for dtype in bf16 fp32; do \
		$(GPU_PYTHON) -m bench step --device cuda --batch 128 --dtype $$dtype --output $(RESULTS) || status=1; \
	done; exit $$status

# The tokens' side: k-means beside its peers, then tokenizing with the network of k-CLIP.
bench-gpu-tokens:
	status=0; \
	$(GPU_PYTHON) -m bench kmeans --output $(RESULTS) || status=1; \
	$(GPU_PYTHON) -m bench tokenize --device cuda --workers 12 --output $(RESULTS) || status=1; exit $$status

lint:
	ruff check . && ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info
