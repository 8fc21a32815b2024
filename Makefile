PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types fits test-gpu clean

demo: $(VENV)/demo
	$(BIN)/framefit run -p "the camera tilts up past the rocket" --seed 1 -o outputs/demo.mp4 --overwrite
	@echo "The video is at outputs/demo.mp4"

test: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -m "not alone" -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
	$(BIN)/pytest -m alone

lint: $(VENV)/test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/test
	$(BIN)/mypy

# The table in docs/fits.md, anew: no card is needed, some ten minutes the first time.
fits: $(VENV)/test
	$(BIN)/framefit plan --table > $(VENV)/fits.md
	{ sed '/^|/d' docs/fits.md; cat $(VENV)/fits.md; } > $(VENV)/page.md
	mv $(VENV)/page.md docs/fits.md

# On a machine with a CUDA card and framefit's dependencies in $(PYTHON).
test-gpu:
	$(PYTHON) -m pytest tests/gpu -m gpu

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/test: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) outputs .mypy_cache .pytest_cache .ruff_cache
