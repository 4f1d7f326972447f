PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint experiment bench docs clean

# One environment for everything; rebuilt only when the requirements change.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/ready
	$(BIN)/python examples/demo.py --output demo-output

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Files run side by side, the longest first; what measures time comes last, alone.
test: lint
	$(BIN)/pytest --ignore tests/test_imports.py --numprocesses 2 --dist loadfile --no-loadscope-reorder
	$(BIN)/pytest tests/test_imports.py

# The paper's experiment in miniature: ten minutes on 2 cores.
experiment: .venv/ready
	$(BIN)/unmerge experiment run --preset micro --output experiment-output
	$(BIN)/unmerge experiment tables experiment-output

bench: .venv/ready
	$(BIN)/python -m benchmarks

docs: .venv/ready
	$(BIN)/python docs/generate.py

clean:
	rm -rf .venv .cache demo-output
