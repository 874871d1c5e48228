# make demo    a Xen domain does block I/O on an ext4 image, served by evtchnd (KEEP=1: leave it running)
# make test    checks and every test, counts at a twentieth (EVTCHND_SCALE); test-full: all of them
# make lab     the emulated machine with Xen-capable KVM that tests/lab runs in (once; root; two minutes, 0.7 GB)
# make mutants the guards against hostile guests are taken away one by one: a test fails for each (ROWS="XSA-39": only these)
# make fuzz    every parser gets bytes of chance, for FUZZ_S seconds (60) in all; what is found is kept in .cache/fuzz
# make guest   a prompt of a real Xen guest in the lab, served by evtchnd (SUITE=bookworm: the older one; ^] or poweroff)
# demo and test set up everything themselves: .venv, Python packages, and Debian packages where root and apt are there.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CORE := $(wildcard evtchnd/_core/*.py evtchnd/_core/*.pxd evtchnd/_core/*.h)

.PHONY: demo test test-full test-unit lab guest check setup bench mutants fuzz clean debian-demo debian-test
.DEFAULT_GOAL := test

debian-demo:
	@tests/debian-packages demo

debian-test:
	@tests/debian-packages test

# The stamp is older than what the compiled module is made from: built again.
$(VENV)/.ready: pyproject.toml setup.py $(CORE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "evtchnd needs Python 3.11 or newer, $(PYTHON) is older: make PYTHON=python3.11"; exit 1; }
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[cli,bench,dev]'
	@$(BIN)/python -c 'from evtchnd import _core; print("evtchnd: hot path", "compiled" if _core.COMPILED else "not compiled (runs as Python)")'
	@touch $@

setup: $(VENV)/.ready

demo: debian-demo
	@$(MAKE) --no-print-directory setup
	@$(BIN)/python -m evtchnd.demo $(if $(KEEP),--keep)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict
	$(BIN)/pytest -q tests/test_layers.py

test: debian-test
	@$(MAKE) --no-print-directory check
	@$(BIN)/python tests/lab prepare --if-possible
	$(BIN)/pytest -q tests

test-full: export EVTCHND_SCALE := 1
test-full: test

test-unit: debian-test
	@$(MAKE) --no-print-directory setup
	$(BIN)/pytest -v tests/unit

lab: setup
	@$(BIN)/python tests/lab prepare

guest: setup
	@$(BIN)/python tests/lab prepare
	@$(BIN)/python tests/lab guest $(SUITE)

mutants: setup
	$(BIN)/python tests/mutants.py $(ROWS)

fuzz: setup
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check 'atheris>=3.0'
	$(BIN)/python tests/fuzz --seconds $(or $(FUZZ_S),60)

bench: setup
	$(BIN)/evtchnd-bench blk

clean:
	rm -rf build dist *.egg-info .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f evtchnd/_core/*.so evtchnd/_core/*.c
