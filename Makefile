# Each target sets up what it needs; a second run finds it done.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MODEL := .models/SmolLM2-135M-Instruct
EXTRAS := dev
# Two tests at a time, as each leaves a core to the other for much of its time. On GPUs each has the memory to itself.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist worksteal
# What the unit tests have run of each line, and what that depends on
COVERAGE := .coverage
SOURCES := $(shell find tprt launch scripts tests configs -type f -not -name '*.pyc') setup.cfg

.PHONY: install demo test check chaos bench clean
# A run of the unit tests that fails leaves no measurement that looks fresh.
.DELETE_ON_ERROR:

install: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

$(MODEL)/config.json: | $(STAMP)
	$(BIN)/python scripts/fetch_demo_model.py

demo: $(STAMP) $(MODEL)/config.json
	$(BIN)/tprt generate configs/smollm2-135m-tp2-cpu.yaml --chat --max-tokens 96 \
	  --prompt "Name three primary colors." \
	  --prompt "Explain in two sentences what a GPU is."

# The unit tests first, with their coverage measured on the way: `make check` judges it.
test: $(STAMP) $(MODEL)/config.json
	rm -f $(COVERAGE)
	$(MAKE) --no-print-directory $(COVERAGE)
	$(PYTEST) tests/process
	$(BIN)/python -m pytest tests/gpu tests/multigpu

$(COVERAGE): $(SOURCES) | $(STAMP) $(MODEL)/config.json
	$(PYTEST) tests/unit --cov --cov-report=

# Runs the unit tests for their coverage only where something has changed since they ran.
check: $(STAMP) $(MODEL)/config.json
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/check_sizes.py
	$(MAKE) --no-print-directory $(COVERAGE)
	$(BIN)/python -m coverage report --skip-covered --fail-under=90

chaos: $(STAMP)
	$(BIN)/python scripts/chaos.py streams --kills 10
	$(BIN)/python scripts/chaos.py

bench: $(STAMP) $(MODEL)/config.json
	$(BIN)/tprt bench compare-hf configs/smollm2-135m-tp2-cpu.yaml --set parallel.tensor_parallel_size=1

clean:
	rm -rf $(VENV) .models .mypy_cache .ruff_cache .pytest_cache .hypothesis $(COVERAGE) *.egg-info
