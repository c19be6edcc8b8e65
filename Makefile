# Both targets set everything up in .venv. `make test` is what CI runs.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
SCHEDULE := merge(at=0,keep=0.5),prune(at=2,selector=random,keep=0.5)
export OMP_NUM_THREADS ?= 1

.PHONY: test gate demo lint train chromium clean

test: lint chromium
	$(BIN)/python -m pytest -n 2 -q
	$(MAKE) gate

# The project holds its own engine to a budget. What a busy machine leaves undecided does not turn the build red.
gate: $(READY)
	env -u OMP_NUM_THREADS $(BIN)/optpass optimize fashion-vit --passes '$(SCHEDULE)' --seconds 0 --force -o out/gate/engine
	env -u OMP_NUM_THREADS $(BIN)/optpass gate out/gate/engine --budget budget.toml --inconclusive pass --junit out/gate/junit.xml

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Reports are tested in it where it is there, or can be installed; elsewhere those tests are skipped.
chromium:
	@command -v chromium >/dev/null || ! command -v apt-get >/dev/null || [ "$$(id -u)" != 0 ] || \
		(apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y chromium) >/dev/null 2>&1 || true

demo: $(READY)
	env -u OMP_NUM_THREADS $(BIN)/optpass demo

train: $(READY)
	env -u OMP_NUM_THREADS $(BIN)/optpass zoo train fashion-vit --output out/fashion-vit

# torch goes first and alone: as a dependency of another package it may come with CUDA libraries of several GB.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q 'torch==2.13.0'
	$(BIN)/python -m pip install -q -c constraints.txt 'setuptools>=80' -e '.[cpu,openvino,quantize,tensorrt,hf,dev,examples]'
	touch $@

clean:
	rm -rf .venv build dist out *.egg-info
