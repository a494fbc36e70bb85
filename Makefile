# make quickstart: install into .venv, train, tag, prune and fine-tune on embedded data.
# make test:       install into .venv, run the tests.
# make docs:       install into .venv, write the docs site to site/.
# Uses uv where it is present, pip otherwise.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# By its name: its path may hold spaces.
UV := $(if $(shell command -v uv 2>/dev/null),uv)

ifdef UV
  CREATE := $(UV) venv --quiet --seed --allow-existing --python $(PYTHON) $(VENV)
  INSTALL := $(UV) pip install --quiet --python $(BIN)/python
else
  CREATE := $(PYTHON) -m venv $(VENV)
  # Bytecode is written as it is needed, as with uv: compiling all of torch takes longer than using it.
  INSTALL := $(BIN)/python -m pip install --quiet --no-compile
endif

.PHONY: install install-dev quickstart test lint docs tutorials coverage clean

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml
	$(CREATE)
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml
	$(CREATE)
	$(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.installed

quickstart: install
	$(BIN)/python train.py experiment=quickstart

# All tests, or of the marks that are asked for: make test MARKS="not slow".
MARKS ?=
# One thread a process: torch's spinning threads and parallel tests do not go together.
test: install-dev
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --dist=loadscope --no-loadscope-reorder -m "$(MARKS)"

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Run the tutorials and write their pictures into them.
tutorials: install-dev
	OMP_NUM_THREADS=1 $(BIN)/python docs/_site/tutorials.py

# Which networks of torchvision and timm can be cut; about 50 minutes on one core.
coverage: install-dev
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/coverage.py --json coverage.json --markdown coverage.md

clean:
	rm -rf $(VENV) outputs multirun site .pytest_cache .mypy_cache .ruff_cache
