# Each target sets up what it needs; a second run finds it done.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MODEL := .models/SmolLM2-135M-Instruct
EXTRAS := dev

.PHONY: install demo test check chaos bench clean

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

test: $(STAMP) $(MODEL)/config.json
	$(BIN)/python -m pytest

check: $(STAMP) $(MODEL)/config.json
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/check_sizes.py
	$(BIN)/python -m pytest tests/unit --cov --cov-report=term:skip-covered --cov-fail-under=90

chaos: $(STAMP)
	$(BIN)/python scripts/chaos.py streams --kills 10
	$(BIN)/python scripts/chaos.py

bench: $(STAMP) $(MODEL)/config.json
	$(BIN)/tprt bench compare-hf configs/smollm2-135m-tp2-cpu.yaml --set parallel.tensor_parallel_size=1

clean:
	rm -rf $(VENV) .models .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
