# Two commands do everything: `make demo` and `make test`. `make` alone lists the rest.

PYTHON ?= python3
ARGS ?=
PY := .venv/bin/python
# Two files at a time, each in a process of its own, in the order of tests/conftest.py; ARGS="-n 0" is one process.
PYTEST := $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder
READY := .venv/installed.stamp

.PHONY: help demo test test-quick lint mutants clean
.DELETE_ON_ERROR:

help:
	@echo "make demo        set up .venv, then run the whole loop: python -m recipes.dpo_extract"
	@echo "make test        set up .venv, then run all tests"
	@echo "make test-quick  the tests that need no Ray and no training (under 2 minutes)"
	@echo "make lint        ruff, mypy, and the import rule of the floors"
	@echo "make mutants     put one fault at a time into the code, in memory, and check that a test notices"
	@echo "make clean       remove .venv and what the tools cached; runs/ stays"
	@echo
	@echo "ARGS=... goes to the command, e.g. make demo ARGS=--help or make test ARGS='tests/engine -x'"
	@echo "PYTHON=python3.12 names another Python (3.11 or newer)"

$(READY): setup.py pyproject.toml constraints.txt tools/setup_venv.py tools/build_cuda.py $(wildcard cuda_ext/csrc/*)
	@command -v "$(PYTHON)" >/dev/null || { echo "there is no $(PYTHON); install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("$(PYTHON) is Python %d.%d; 3.11 or newer is needed: make PYTHON=python3.12" % sys.version_info[:2])'
	@$(PYTHON) tools/setup_venv.py

demo: $(READY)
	@$(PY) -m recipes.dpo_extract $(ARGS)

test: $(READY)
	@$(PYTEST) --durations=15 $(ARGS)

test-quick: $(READY)
	@$(PYTEST) -m "not slow" $(ARGS)

lint: $(READY)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@.venv/bin/lint-imports

mutants: $(READY)
	@$(PY) tests/mutants/run.py $(ARGS)

clean:
	rm -rf .venv build cuda_ext/libember_cuda.so *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
