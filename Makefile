# `make run` and `make test` do all their own set-up; everything else is for those who change Baton.
PYTHON ?= python3
VENV   ?= .venv
# The torch to install. The default is the CPU build; for another device name its requirement, for
# example TORCH='torch==2.13.0 --index-url <the index of that build>'.
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
STAMPS := $(VENV)/.made

PROTOS  := $(wildcard proto/baton/v1/*.proto)
NATIVE  := $(wildcard native/*)

FORCE:

.PHONY: FORCE run test lint format types check build clean compose-test

run: build
	$(BIN)/python scripts/run_demo.py

test: build $(STAMPS)/test
	$(BIN)/python -m pytest

lint: $(STAMPS)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMPS)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: build $(STAMPS)/lint
	$(BIN)/mypy

compose-test: build
	$(BIN)/python scripts/compose_test.py

check: lint types test

build: $(STAMPS)/native

$(STAMPS)/venv: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt $(TORCH)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/proto: $(PROTOS) $(STAMPS)/venv pyproject.toml
	$(BIN)/python scripts/install_group.py build
	@mkdir -p baton/v1 && touch baton/v1/__init__.py
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out=. --pyi_out=. --grpc_python_out=. $(PROTOS)
	@touch $@

# An editable install knows its modules by name: it is made again when one comes or goes.
$(STAMPS)/modules: $(STAMPS)/proto FORCE
	@find baton services policies -name '*.py' | sort | cmp -s - $@ || \
	    find baton services policies -name '*.py' | sort > $@

$(STAMPS)/native: $(STAMPS)/proto $(STAMPS)/modules $(NATIVE) CMakeLists.txt pyproject.toml
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(STAMPS)/test $(STAMPS)/lint: $(STAMPS)/%: $(STAMPS)/venv pyproject.toml
	$(BIN)/python scripts/install_group.py $*
	@touch $@

clean:
	rm -rf $(VENV) build baton/v1 .pytest_cache .mypy_cache .ruff_cache
