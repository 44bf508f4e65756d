# The only commands a newcomer needs. `make demo` and `make test` work on a fresh clone with Python >= 3.11 and pip.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# the tested versions; `make install CONSTRAINTS=` installs whatever pyproject.toml allows
CONSTRAINTS ?= constraints.txt

.PHONY: install demo test test-all lint bench clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) torch
	$(BIN)/pip install --quiet $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e ".[dev]"
	@touch $@

demo: install
	$(BIN)/everlearn model fetch
	$(BIN)/everlearn demo

test: install lint
	$(BIN)/everlearn model fetch
	$(BIN)/pytest

test-all: install lint
	$(BIN)/everlearn model fetch
	$(BIN)/pytest -m "slow or not slow"

lint: install
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: install
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache
