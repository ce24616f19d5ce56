# SPDX-License-Identifier: MIT
# One command each; every target sets up what it needs. `make help` lists them.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# of a GPU for which gpu-pack builds the programs, as 90 for sm_90; empty: none
GPU_ARCH ?=
GPU_PACK := build/gpu/entrollm-gpu.tar.xz
GPU_OUT  ?= build/gpu/out
TEST_WORKERS ?= 2
FUZZ_MINUTES ?= 5
PART ?= 4/1

.PHONY: help venv runtime runtime-tests wheels demo demo-full test test-asan test-tsan test-neon test-upstream test-soak test-archs test-wheels fuzz
.PHONY: bench-micro bench-e2e bench-memory bench-scale bench-starved bench-quality bench-build cuda-objects gpu-pack gpu-run lint clean

help: ## this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

venv: $(STAMP) ## Python environment with all dependencies

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: needs Python 3.11 or newer; set PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "make: this Python has no venv module (apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	touch $@

runtime: $(STAMP) ## build (or take from the cache) and install the patched llama.cpp
	$(BIN)/entrollm runtime build

runtime-tests: $(STAMP) ## the same with upstream's test programs and our own, which `test` and others need
	$(BIN)/entrollm runtime build --tests

wheels: $(STAMP) ## wheels for other x86-64 Linux machines and an index of them, in build/wheels; half an hour on two cores (docs/wheels.md)
	$(BIN)/pip install -q -c constraints.txt -e '.[test,wheels]'
	$(BIN)/entrollm runtime wheel --out build/wheels

demo: runtime ## a real model compared with stock types, a question, an HTML report; files in build/demo
	$(BIN)/entrollm demo --out build/demo

demo-full: runtime ## the same with eight recipes, a longer calibration and more text
	$(BIN)/entrollm demo --full --out build/demo

test: runtime-tests lint ## all tests of the default tier
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

test-asan: runtime-tests ## codec, ops and loader under AddressSanitizer and UBSan; a quarter of the damaged files, with PART=1/1 all of them
	PART=$(PART) bash tests/sanitizers/run.sh $(BIN) address

test-tsan: runtime-tests ## ops with several threads, under ThreadSanitizer
	bash tests/sanitizers/run.sh $(BIN) thread

test-neon: runtime-tests ## codec and CPU ops for aarch64 at every kernel level, neon first, cross-compiled, under qemu-user
	$(BIN)/python tests/neon/run.py

test-upstream: runtime-tests ## all of upstream's test-backend-ops on the CPU; a quarter of an hour, so no part of `test` and CI; build/test-upstream.log
	@mkdir -p build
	@$$($(BIN)/python -c 'from entrollm_gguf import runtime; print(runtime.tool("test-backend-ops"))') test -b CPU > build/test-upstream.log; \
	    code=$$?; grep -a "FAIL" build/test-upstream.log; tail -n 3 build/test-upstream.log; exit $$code

test-wheels: runtime-tests wheels ## those wheels in an environment of their own, without compiler: every tool, every CPU variant that runs here
	ENTROLLM_WHEELS=build/wheels $(if $(wildcard build/wheels-cuda/index.html),ENTROLLM_CUDA_WHEELS=build/wheels-cuda) $(BIN)/python -m pytest -n 0 tests/cross/test_wheels.py

fuzz: runtime-tests ## damaged files and random codes with fresh seeds for FUZZ_MINUTES (5), under AddressSanitizer and UBSan
	$(BIN)/python tests/fuzz/run.py $(FUZZ_MINUTES)

test-soak: runtime-tests ## conversions interrupted at random, and a server under eight unruly streams for SOAK_MINUTES (5) in each mode
	$(BIN)/python -m pytest -q -s tests/soak/interrupts.py tests/soak/server.py

test-archs: runtime-tests ## every architecture that upstream's own test can make, hostile files and converted ones in both modes; a quarter of an hour
	$(BIN)/python -m pytest -q -s tests/soak/architectures.py

bench-micro: runtime-tests ## decoding and matrix products of the CPU kernels beside stock types; build/bench/kernels.json
	@mkdir -p build/bench
	$(BIN)/python bench/kernels.py build/bench/kernels.json

bench-e2e: runtime ## llama-bench over stock types and ours in load and fused mode, in alternating rounds; build/bench/e2e.json
	@mkdir -p build/bench
	$(BIN)/python bench/e2e.py build/bench/e2e.json

bench-scale: runtime ## a random model of 1 G weights beside stock types, cold starts, memory's speed; 8 GB of files, half an hour; build/bench/scale.json
	@mkdir -p build/bench
	$(BIN)/python bench/scale.py build/scale build/bench/scale.json

bench-starved: runtime ## the same files where memory is short; needs root and the files of bench-scale; build/bench/starved.json
	@mkdir -p build/bench
	$(BIN)/python bench/starved.py build/scale build/bench/starved.json 850

bench-memory: runtime ## resident memory of fused mode against the compressed size, cold starts; build/bench/memory.json
	@mkdir -p build/bench
	$(BIN)/python bench/memory.py build/bench/memory.json

bench-quality: runtime ## size against quality, stock types and ours; takes an hour; build/bench/quality.json and docs/quality.*
	@mkdir -p build/bench
	$(BIN)/python bench/quality.py build/quality build/bench/quality.json

bench-build: $(STAMP) ## build time of the runtime beside a stock llama-cpp-python, both from nothing; half an hour; build/bench/build-time.json
	@mkdir -p build/bench
	$(BIN)/python bench/build_time.py build/bench/build-time.json

cuda-objects: runtime-tests ## CUDA sources compiled for all architectures, instructions counted, kernels run on the CPU; needs nvcc, no GPU
	$(BIN)/python bench/gpu/objects.py build/bench/cuda-instructions.json
	$(BIN)/python -m pytest tests/cuda

gpu-pack: runtime-tests ## what travels to a machine with a GPU, in one file; with GPU_ARCH=90 the programs for sm_90, built here
	$(BIN)/python bench/gpu/pack.py $(GPU_PACK) $(if $(GPU_ARCH),--arch $(GPU_ARCH))

gpu-run: ## on that machine, with nothing but nvcc, cmake and Python: build, check and measure; call again until it says 0 to do (docs/cuda.md)
	$(PYTHON) bench/gpu/run.py $(GPU_PACK) --out $(GPU_OUT)

lint: $(STAMP) ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check -q .
	$(BIN)/lint-imports --no-logo --no-cache

clean: ## remove the environment and build outputs (not the user's cache)
	rm -rf $(VENV) build dist
