PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types test-gpu clean

demo: $(VENV)/demo
	$(BIN)/framefit run -p "the camera tilts up past the rocket" --seed 1 -o outputs/demo.mp4 --overwrite
	@echo "The video is at outputs/demo.mp4"

test: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -m "not alone" -n logical --maxprocesses 4 --dist loadfile
	$(BIN)/pytest -m alone

lint: $(VENV)/test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/test
	$(BIN)/mypy

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
