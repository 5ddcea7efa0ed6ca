# `make run` and `make test` do all their own set-up; everything else is for those who change Baton.
PYTHON ?= python3
VENV   ?= .venv
# The torch that `make test` and `make torch` install. Which build that is, CPU or another, is for the
# index that pip uses to say; to choose, TORCH='torch==2.13.0 --index-url <the index of that build>'.
# `make run` needs none.
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
STAMPS := $(VENV)/.made

PROTOS  := $(wildcard proto/baton/v1/*.proto)
NATIVE  := $(wildcard native/*)

FORCE:

.PHONY: FORCE run torch test asan arm sim sim-nightly lint format types check build clean compose-test

run: build
	$(BIN)/python scripts/run_demo.py

torch: $(STAMPS)/torch

test: build $(STAMPS)/torch $(STAMPS)/test
	$(BIN)/python -m pytest

# The engine over any shape, in a build that watches every access to memory.
asan: build $(STAMPS)/test
	$(BIN)/python scripts/asan.py

# The engine for 64-bit ARM, compiled and run under qemu: Debian's g++-aarch64-linux-gnu, qemu-user.
arm:
	sh scripts/arm.sh

# The deterministic simulation; a failing seed prints the command that replays it.
SEEDS      ?= 2000
FIRST_SEED ?= 0
JOBS       ?= 2

sim: build $(STAMPS)/torch $(STAMPS)/test
	$(BIN)/python -m tests.sim --seeds $(SEEDS) --first-seed $(FIRST_SEED) --jobs $(JOBS)

sim-nightly: build $(STAMPS)/torch $(STAMPS)/test
	$(BIN)/python -m tests.sim --seeds 200000 --first-seed $(FIRST_SEED) --jobs $(JOBS)

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
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: $(STAMPS)/venv
	$(BIN)/python -m pip install --quiet -c constraints.txt $(TORCH)
	@touch $@

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
