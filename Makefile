# Everything sets itself up: `make quickstart` and `make test` need only make and Python >= 3.11.
#
#   make quickstart   train, convert, evaluate and sample on this machine; writes a report
#   make test         the fast tests            make test-all    fast ones and all that CI runs, test-compat too
#   make study-conversion   one AR model and every conversion recipe from it: figures and tables; resumes
#   make smoke        two minutes: train, kill, resume, sample
#   make test-compat  the `compat` subset on a newer Python and jax, where one is found
#   make setup lint docs bench test-full clean
#
# PYTHON=  interpreter to use (default: the first one >= 3.11 that runs)   VENV=  where the environment goes
# WORKERS= test processes   ARGS=  passed on: make test ARGS="-k masks"    PIP_ARGS=  passed to pip install
# test-all installs PyTorch too; PyPI's build for Linux brings CUDA (GBs), which this avoids:
#   make test-all PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

SHELL   := /bin/bash
VENV    ?= .venv
COMPAT  ?= $(VENV)-compat
WORKERS ?= 2
ARGS    ?=
PIP_ARGS ?=
BIN     := $(VENV)/bin
PYTEST  := JAX_PLATFORMS=cpu $(BIN)/python -m pytest

# What `make test` runs. Bits are compared at XLA's full optimisation; the rest compiles twice as fast without.
FAST   := not (slow or full or parity or aot or multiprocess)
LONG   := (slow or parity) and not (full or aot or multiprocess)
FAST_XLA := XLA_FLAGS="$(XLA_FLAGS) --xla_backend_optimization_level=0"
COMPAT_TESTS ?= compat and not (full or aot or multiprocess)
# pytest's exit code 5, "no tests selected", is no failure of a group.
OR_EMPTY := || [ $$? -eq 5 ]

# Tried in this order by test-compat, by running them; a version manager's own folders are looked into as well.
NEWER := $(or $(PYTHON_COMPAT),python3.12 python3.13 python3.14 python3 \
  $(sort $(wildcard $(HOME)/.pyenv/versions/3.1[2-9]*/bin/python3)))

.PHONY: setup quickstart study-conversion smoke test test-extra test-all test-full test-compat compat-run lint docs bench clean
.DEFAULT_GOAL := setup

setup: $(VENV)/.stamp-core
	@echo "ready: $(BIN)/genmodels --help"

quickstart: $(VENV)/.stamp-core
	$(BIN)/genmodels quickstart $(ARGS)

# One AR model, every conversion recipe from it, figures and tables; prints how long it will take, and resumes.
study-conversion: $(VENV)/.stamp-core
	$(BIN)/python -m genmodels.studies.conversion $(ARGS)

smoke: $(VENV)/.stamp-core
	$(BIN)/genmodels quickstart --smoke $(ARGS)

test: $(VENV)/.stamp-dev
	$(FAST_XLA) $(PYTEST) -n $(WORKERS) --dist worksteal -m "$(FAST) and not strict" $(ARGS) $(OR_EMPTY)
	$(PYTEST) -n $(WORKERS) --dist worksteal -m "$(FAST) and strict" $(ARGS) $(OR_EMPTY)

# What test-all adds to test: reference parity, long tests, own processes, TPU compiles (libtpu: one process).
test-extra: $(VENV)/.stamp-dev $(VENV)/.stamp-parity $(VENV)/.stamp-tpu
	$(FAST_XLA) $(PYTEST) -n $(WORKERS) --dist worksteal -m "$(LONG) and not strict" $(ARGS) $(OR_EMPTY)
	$(PYTEST) -n $(WORKERS) --dist worksteal -m "$(LONG) and strict" $(ARGS) $(OR_EMPTY)
	$(PYTEST) -m "multiprocess and not full" $(ARGS) $(OR_EMPTY)
	$(PYTEST) -m "aot and not (full or multiprocess)" $(ARGS) $(OR_EMPTY)

test-all: test test-extra test-compat

test-full: test-all
	$(PYTEST) -m full $(ARGS) $(OR_EMPTY)
	@$(MAKE) --no-print-directory test-compat COMPAT_TESTS="compat and full"
	@$(MAKE) --no-print-directory test-compat COMPAT_TESTS="slow and not compat" ARGS="tests/kernels $(ARGS)"

# The ranges of setup.py mean another jax on another Python: one step of every family and the kernels there,
# those for Hopper in the GPU interpreter, which the oldest jax does not have.
test-compat:
	@for py in $(NEWER); do \
	  if "$$py" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then found=$$py; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "test-compat: skipped, no Python >= 3.12 runs here (tried: $(NEWER)); PYTHON_COMPAT= names one"; exit 0; \
	fi; \
	$(MAKE) --no-print-directory VENV=$(COMPAT) PYTHON="$$found" compat-run

compat-run: $(VENV)/.stamp-dev
	@$(BIN)/python -c 'import sys, jax; print("compat: Python", sys.version.split()[0], "jax", jax.__version__)'
	$(FAST_XLA) $(PYTEST) -n $(WORKERS) --dist worksteal -m "$(COMPAT_TESTS)" $(ARGS)

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/lint-imports --no-cache

docs: $(VENV)/.stamp-dev
	$(BIN)/mkdocs build --strict --quiet --site-dir site
	@echo "docs: site/index.html"

# attention.py prints attention_tpu.py's table where there is no GPU.
bench: $(VENV)/.stamp-core
	@for b in benchmarks/*.py; do \
	  if [ $$b = benchmarks/attention_tpu.py ]; then continue; fi; \
	  echo "== $$b"; $(BIN)/python $$b $(ARGS) || exit 1; \
	done

clean:
	rm -rf $(VENV) $(COMPAT) build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per set of extras; each is made anew when the metadata changes.
$(VENV)/.stamp-core: setup.py pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -e .
	@touch $@

$(VENV)/.stamp-%: $(VENV)/.stamp-core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -e ".[$*]"
	@touch $@

# The first interpreter >= 3.11 that runs: a version manager's shim may be there and still not run.
$(BIN)/python:
	@for py in $(or $(PYTHON),python3.11 python3.12 python3.13 python3.14 python3 python); do \
	  if "$$py" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then found=$$py; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "No Python >= 3.11 that runs among: $(or $(PYTHON),python3.11 ... python3.14 python3 python)." >&2; \
	  echo "Install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1; \
	fi; \
	version=$$("$$found" -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	if ! "$$found" -c 'import venv, ensurepip' >/dev/null 2>&1; then \
	  echo "$$found has no venv module. Install it: apt install python$$version-venv (Debian, Ubuntu)," >&2; \
	  echo "or use a Python that has it: make PYTHON=/path/to/python3" >&2; exit 1; \
	fi; \
	echo "environment: $(VENV), Python $$version ($$found)"; \
	"$$found" -m venv --clear "$(VENV)" || { rm -rf "$(VENV)"; exit 1; }
