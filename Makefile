# `make` alone lists the targets. Each builds what it needs in .venv, from nothing:
# versions and hashes come from requirements/*.lock.

# Any Python 3.12. Another one: `make PYTHON=path/to/python3.12 test`.
PYTHON ?= $(shell for name in python3.12 python3 python; do \
  $$name -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null \
  && { command -v $$name; break; }; done)
# Test processes at a time. `make JOBS=0 test` runs all in one process.
JOBS ?= 2
# More arguments for pytest or the trainer: `make test ARGS="-k gae -x"`.
ARGS ?=
# Where `make quickstart` keeps its run. The same folder again resumes or shows it.
WORKDIR ?= runs/quickstart

# Compiled programs are kept here between runs and tests.
CACHE_HOME := $(if $(XDG_CACHE_HOME),$(XDG_CACHE_HOME),$(HOME)/.cache)
export JAX_COMPILATION_CACHE_DIR ?= $(CACHE_HOME)/realjax/jax

# With an NVIDIA GPU, quickstart adds JAX's CUDA libraries. `make CUDA= quickstart`: CPU.
CUDA ?= $(shell command -v nvidia-smi)

BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -q

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart test test-all test-gpu check check-gpu-compile fmt notebooks setup cuda lock clean

help:  ## This list
	@grep -hE '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | sed 's/:.*  ## /\t/' | expand -t 20

quickstart: .venv/.run $(if $(CUDA),.venv/.cuda)  ## Fine-tune, train a reward model, run PPO: text to a better model
	$(BIN)/python -m realjax.cli.train --config=configs/quickstart.py \
	  --workdir=$(WORKDIR) $(ARGS)

test: .venv/.dev  ## What CI runs: every fact once, on 8 virtual CPU devices
	$(PYTEST) -n $(JOBS) --dist worksteal -m "not slow and not gpu" $(ARGS)

test-all: .venv/.dev .venv/.aot  ## Everything: full matrices, many kills, long runs
	$(PYTEST) -n $(JOBS) --dist worksteal -m "not gpu" $(ARGS)

test-gpu: .venv/.dev .venv/.cuda  ## The tests that need an accelerator
	REALJAX_TEST_DEVICE=gpu $(PYTEST) -m gpu $(ARGS)

check: .venv/.dev  ## Format, lint, types, and the house rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(PYTEST) tests/house

check-gpu-compile: .venv/.dev .venv/.aot  ## Compile 8B steps for GPUs that are not there; check memory
	$(PYTEST) -n 0 tests/gpu_compile_test.py tests/gpu_compile_weights_test.py \
	  tests/gpu_kernels_test.py tests/gpu_plans_test.py $(ARGS)

fmt: .venv/.dev  ## Format, and fix what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

notebooks: .venv/.dev  ## Execute the notebooks
	$(PYTEST) -m notebook $(ARGS)

setup: .venv/.dev  ## Only build .venv, with the tools for development

cuda: .venv/.cuda  ## Add JAX's CUDA libraries to .venv

clean:  ## Delete .venv and what the tools leave behind
	rm -rf .venv build dist .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

lock: .venv/.installer  ## Resolve the newest versions into requirements/*.lock
	PATH="$(CURDIR)/$(BIN):$$PATH" requirements/lock.sh $(ARGS)

# The installer first, by pip; it then installs the rest in parallel. Where the
# installer cannot reach an index (it does not read pip's settings), pip does it all.
# realjax itself is one line in a .pth file, made by the build backend beside it.
install = { $(BIN)/uv pip install --quiet --python $(BIN)/python --no-config \
    --require-hashes --requirements $(1) \
  || $(BIN)/python -m pip install --quiet --no-compile --require-hashes \
    --requirement $(1); }

.venv/.installer: requirements/installer.lock
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  test -n "$(PYTHON)" || { echo "No Python 3.12 found: python3.12, python3 and \
	python were tried. Install it, or name it: make PYTHON=path/to/python3.12" >&2; \
	  exit 1; }; \
	  echo "Building .venv with $(PYTHON)"; \
	  $(PYTHON) -m venv .venv; \
	fi
	@$(BIN)/python -m pip install --quiet --no-compile --require-hashes \
	  --disable-pip-version-check --requirement $<
	@touch $@

.venv/.run: requirements/run.lock pyproject.toml .venv/.installer
	@$(call install,$<)
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation \
	  --disable-pip-version-check --editable .
	@touch $@

.venv/.dev: requirements/dev.lock .venv/.run
	@$(call install,$<)
	@touch $@

.venv/.cuda: requirements/cuda.lock .venv/.run
	@$(call install,$<)
	@touch $@

# Beside .venv's packages, not among them: JAX would look for a GPU at every start.
# PYTHONPATH=.venv/aot adds them. A folder of its own, so that nothing old stays in it.
.venv/.aot: requirements/aot.lock .venv/.run
	@rm -rf .venv/aot
	@$(BIN)/python -m pip install --quiet --no-compile --no-deps --require-hashes \
	  --disable-pip-version-check --target .venv/aot --requirement $<
	@touch $@
