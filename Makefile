# Two commands a new user needs: `make demo` and `make test`. Both make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Bytecode is made, and kept, of what is used: pip would take half a minute to make it of everything.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo check test test-all test-gpu harvest harvest-second harvest-dry bench-gpu bench-gpu-sweep bench-gpu-volta bench-gpu-tokens clean

$(VENV)/.installed: pyproject.toml setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mapet needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --editable '.[test,demo]'
	touch $@

# What only a developer needs: ruff, mypy, pre-commit.
$(VENV)/.checks: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-compile --editable '.[dev]'
	touch $@

# Another Triton beside the installed one, of which tests see what it makes of the kernels; 190 MB.
$(VENV)/triton36/.installed: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-compile --no-deps --upgrade --target $(@D) triton==3.6.0
	touch $@

# The oldest timm that is allowed, of which tests see that it runs no code in the files given to mapet; 16 MB on disk.
$(VENV)/timm_oldest/.installed: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-compile --no-deps --upgrade --target $(@D) timm==1.0.26
	touch $@

OLDER := $(VENV)/triton36/.installed $(VENV)/timm_oldest/.installed

demo: $(VENV)/.installed
	$(BIN)/mapet demo --output runs/demo

# A process for each core, and one thread in it: the tests' sizes gain nothing from more threads.
# Tests marked long are left to test-all.
TESTS = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal
test: $(VENV)/.installed $(OLDER)
	$(TESTS) tests -m "not long"

test-all: $(VENV)/.installed $(OLDER)
	$(TESTS) tests

# Before a commit: lint, types, and the tests that take seconds: of most parts, none that compiles, kills or draws.
CHECKS = attention_arguments augment backends cache checkpoint codebook flash_backend golden images kmeans \
	kmeans_launch layers learner loader metrics model numbers ops optim parsing permuted_embed progress recipes rng \
	schedule selfcheck stages static_cost tile_count tokenizers toy_tokenizer visibility
check: $(VENV)/.checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(TESTS) $(CHECKS:%=tests/test_%.py) -m "not slow and not long and not gpu" -k "not (compil or kill or error_budget or gradcheck)"

# On a machine whose Python has torch and pytest already, and no network: make test-gpu GPU_PYTHON=python3
# (CONTRIBUTING.md, On a GPU machine). Each is meant to end within 10 minutes.
GPU_PYTHON ?= $(BIN)/python
GPU_TESTS = $(shell grep -l 'mark\.gpu' tests/test_*.py)
RESULTS ?= bench/results

# Only files with GPU tests are read, which need few packages, and this one need not be installed. Most of the time goes
# into compiling kernels, so that it is spread over processes where pytest-xdist is installed. It ends within 470 s: after
# 370 s no test is started, 45 s later workers that still run one are ended, at 450 s the whole is interrupted. Failures
# are in $(GPU_LOG)/failures.txt as soon as they are known, all output in gpu_tests.log there.
GPU_LOG ?= build/test-gpu
GPU_LIMITS = --stop-after 370 -o faulthandler_timeout=110 --keep-failures $(GPU_LOG)/failures.txt
test-gpu:
	mkdir -p $(GPU_LOG)/path; rm -f $(GPU_LOG)/failures.txt; ln -sfn $(CURDIR)/kernels $(GPU_LOG)/path/mapet_kernels; \
	spread=$$($(GPU_PYTHON) -c 'import xdist; print("-n 6 --dist worksteal")' 2>/dev/null); \
	export PYTHONPATH=$(abspath $(GPU_LOG))/path:$(CURDIR):$$PYTHONPATH OMP_NUM_THREADS=2 PYTHONUNBUFFERED=1; \
	{ timeout -s INT -k 20 450 $(GPU_PYTHON) -m pytest $(GPU_TESTS) -m gpu -rfEs --durations=15 $(GPU_LIMITS) $$spread; \
		echo $$? > $(GPU_LOG)/status; } 2>&1 | tee $(GPU_LOG)/gpu_tests.log; \
	exit $$(cat $(GPU_LOG)/status)

# All evidence that a GPU can give in MINUTES, as four files in HARVEST, a new folder for every call: it needs torch,
# triton and numpy alone, and no part that breaks costs another anything (bench/harvest.py).
STAMP := $(shell date -u +%Y%m%dT%H%M%S)
HARVEST ?= build/harvest-$(STAMP)
MINUTES ?= 6
harvest:
	$(GPU_PYTHON) bench/harvest.py --minutes $(MINUTES) --output "$(HARVEST)"

# The second call, of what failed in the first, whose HARVEST is FIRST, and what follows from its figures.
harvest-second: MINUTES = 4
harvest-second:
	@test -n "$(FIRST)" || { echo "make harvest-second FIRST=DIR: DIR is the folder of the first call" >&2; exit 2; }
	$(GPU_PYTHON) bench/harvest.py --second "$(FIRST)" --minutes $(MINUTES) --output "$(HARVEST)"

# Every part on a CPU, small, the kernels interpreted: about four minutes of one core.
harvest-dry: $(VENV)/.installed
	$(BIN)/python bench/harvest.py --dry-run --minutes 30 --output "$(HARVEST)-dry"

# Four parts in 590 s at most. Each stops by itself at its own limit, and what it has by then is its record; `timeout`
# sends SIGTERM, which keeps the record too, to a part that hangs. One that fails does not stop the next.
BENCH_GPU = --device cuda --output $(RESULTS)
bench-gpu:
	mkdir -p $(RESULTS); status=0; \
	timeout -k 5 150 $(GPU_PYTHON) -m bench attention $(BENCH_GPU) --preset targets --time-limit 125 || status=1; \
	timeout -k 5 210 $(GPU_PYTHON) -m bench run --suite step $(BENCH_GPU) --model base small tiny --dtype bf16 fp16 \
		--batch 128 --gpu-memory 16GiB --no-compile --time-limit 185 || status=1; \
	timeout -k 5 145 $(GPU_PYTHON) -m bench ablation $(BENCH_GPU) --model tiny --dtype bf16 --batch 128 \
		--time-limit 120 || status=1; \
	timeout -k 5 65 $(GPU_PYTHON) profiling/step_roofline.py --workload.device cuda --workload.model base \
		--workload.batch 64 --workload.precision bf16 > $(RESULTS)/step_roofline_$$(date -u +%Y%m%dT%H%M%S).md || status=1; \
	exit $$status

# Every suite on a GPU, sizes swept: throughput, pre-training with its data, memory, scaling. About 25 minutes.
bench-gpu-sweep:
	status=0; \
	$(GPU_PYTHON) -m bench run --suite kernels attention pretrain $(BENCH_GPU) --workers 12 || status=1; \
	$(GPU_PYTHON) -m bench run --suite step $(BENCH_GPU) --model base --batch 16 32 64 96 128 --no-compile || status=1; \
	$(GPU_PYTHON) -m bench run --suite step $(BENCH_GPU) --batch 32 --patch-size 32 16 14 8 --no-compile || status=1; \
	$(GPU_PYTHON) -m bench run --suite step $(BENCH_GPU) --batch 32 --image-size 112 224 320 448 --no-compile || status=1; \
	exit $$status

# The step of a V100, rehearsed on the GPU at hand: the kernels in CUDA C++ as PTX for sm_75, the oldest that CUDA 13
# knows, which the driver translates; fp16; 16 GiB. With nvcc of CUDA 12: VOLTA_ARCH=7.0+PTX.
VOLTA_ARCH ?= 7.5+PTX
bench-gpu-volta:
	MAPET_BUILD_CUDA=1 TORCH_CUDA_ARCH_LIST=$(VOLTA_ARCH) $(GPU_PYTHON) -m pip install --quiet --no-deps \
		--no-build-isolation --target build/volta --upgrade .
	mkdir -p $(RESULTS); PYTHONPATH=build/volta $(GPU_PYTHON) -m bench run --suite step $(BENCH_GPU) --backend cuda \
		--model base small tiny --dtype fp16 --batch 128 --gpu-memory 16GiB --no-compile --time-limit 240

# The tokens' side: k-means beside its peers, then tokenizing with the network of k-CLIP.
bench-gpu-tokens:
	status=0; \
	$(GPU_PYTHON) -m bench kmeans $(BENCH_GPU) --dtype fp16 || status=1; \
	$(GPU_PYTHON) -m bench tokenize $(BENCH_GPU) --dtype fp16 --workers 12 || status=1; exit $$status

clean:
	rm -rf $(VENV) build *.egg-info
