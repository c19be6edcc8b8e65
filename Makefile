# Both targets set everything up in .venv. `make test` is what CI runs.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
export OMP_NUM_THREADS ?= 1

.PHONY: test demo lint train clean

test: lint
	$(BIN)/python -m pytest -n 2 -q

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

demo: $(READY)
	OMP_NUM_THREADS= $(BIN)/optpass demo

train: $(READY)
	OMP_NUM_THREADS= $(BIN)/optpass zoo train fashion-vit --output out/fashion-vit

# torch goes first and alone: as a dependency of another package it may come with CUDA libraries of several GB.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q 'torch==2.13.0'
	$(BIN)/python -m pip install -q -c constraints.txt 'setuptools>=80' -e '.[cpu,openvino,hf,dev]'
	touch $@

clean:
	rm -rf .venv build dist out *.egg-info
