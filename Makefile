# Two commands do everything on a machine with Python and git:
#   make steer   steer the embedded model with the embedded reward; look at runs/demo/grid.png
#   make test    run the whole test suite
PYTHON ?= python3
PYTEST_ARGS ?= -n 2
BIN := .venv/bin

.PHONY: steer test lint bench clean

steer: .venv/.run
	$(BIN)/kilter steer --config configs/tiny/steer.yaml --out runs/demo --overwrite

test: .venv/.dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: .venv/.dev
	$(BIN)/python benchmarks/steer_shapes.py
	$(BIN)/python benchmarks/budget.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/train_shapes.py
	$(BIN)/python benchmarks/rlcm.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/score.py
	$(BIN)/python benchmarks/learn_rewards.py

# Each stamp is newer than pyproject.toml exactly when the environment holds what it asks for.
.venv/bin/pip:
	$(PYTHON) -m venv .venv

.venv/.run: pyproject.toml | .venv/bin/pip
	$(BIN)/python -m pip install -q -e .
	touch $@

.venv/.dev: pyproject.toml | .venv/bin/pip
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@ .venv/.run

clean:
	rm -rf .venv build *.egg-info
