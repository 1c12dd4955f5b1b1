# Every target does its own set-up in .venv, once, and starts at once the next time. GNU make 3.81 or later.
#
#   make demo    train the built-in model on a CPU and compare it before and after
#   make test    the fast tests          make lint    ruff
#   make bench   hpsafety against its peers, in .venv-bench; BENCH=score, reward, generate, ppo or distill, not sft
#   make test-mutations   plants bugs in the C++, Triton and CUDA kernels; the tests must notice each
#   make test-kernels     Triton and CUDA kernels on drawn shapes, many of them
#   make test-cuda        CUDA kernels on an emulated GPU: numbers, races, bounds, orders
#   make test-ladder      the GPU kernels without a GPU, small: interpreter and emulation, memory, machine code, a fifth of
#                         the mutants (FIFTH=0 to 4)
#   make docs    the documentation as a site, links checked: build/site/index.html
#   make clean   removes what was built  make distclean   removes the environments too
#
# PYTHON=python3.12 make demo     uses that Python
# HPSAFETY_NO_EXT=1 make demo     goes without the C++ kernels (slow)
# ARGS="--seed 1" make demo       hands arguments on; also: make test ARGS="-k rope", make bench ARGS=--help

VENV ?= .venv
ARGS ?=
BENCH ?= sft
PY := $(VENV)/bin/python
SET_UP := $(PY) make/environment.py
SOURCES := setup.py $(shell find csrc/*.cpp csrc/cpu csrc/cuda -type f -name '*.[ch]*' 2>/dev/null)
RUN_BENCH := $(PY) -m bench.end_to_end.$(BENCH)

FIFTH ?= $(shell git rev-list --count HEAD 2>/dev/null || echo 0)

.PHONY: demo test test-mutations test-kernels test-cuda test-ladder lint docs bench clean distclean help
.DELETE_ON_ERROR:
.NOTPARALLEL:

help:
	@sed -n '3,15s/^# *//p' Makefile

demo: $(VENV)/.built $(VENV)/.demo
	@$(PY) -m hpsafety demo $(ARGS)

test: $(VENV)/.built $(VENV)/.demo $(VENV)/.test
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --maxprocesses 4 --dist loadfile $(ARGS)

test-mutations: $(VENV)/.built $(VENV)/.test
	@OMP_NUM_THREADS=1 $(PY) -m tests.mutations.run $(ARGS)

test-kernels: $(VENV)/.built $(VENV)/.test
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --maxprocesses 4 -m "sweep or not slow" tests/triton tests/cuda $(ARGS)

test-cuda: $(VENV)/.built $(VENV)/.test
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --maxprocesses 4 --dist loadfile -m "not slow and not sweep" tests/cuda $(ARGS)

# make test has interpreted and audited the kernels already; here is what it leaves out.
test-ladder: $(VENV)/.built $(VENV)/.test
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --maxprocesses 4 --dist loadfile tests/triton $(ARGS)
	@$(MAKE) test-cuda
	@$(PY) -m bench.static --check
	@OMP_NUM_THREADS=1 $(PY) -m tests.mutations.run --only triton cuda --fifth $(FIFTH)

lint: $(VENV)/.lint
	@$(PY) -m ruff check . && $(PY) -m ruff format --check .

docs: $(VENV)/.docs
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build -q && echo "docs: build/site/index.html"

bench:
	@$(MAKE) VENV=.venv-bench run-bench

.PHONY: run-bench
run-bench: $(VENV)/.built $(VENV)/.demo $(VENV)/.bench
	@$(RUN_BENCH) $(ARGS)

clean:
	rm -rf build hpsafety.egg-info hpsafety/*.so .venv/.built .venv-bench/.built

distclean: clean
	rm -rf .venv .venv-bench

# Stamps. environment.py touches one when its step is complete; without a compiler .built stays away, so that the
# next call looks again.
$(VENV)/.python: make/create_venv.sh
	@sh make/create_venv.sh "$(VENV)"

$(VENV)/.torch: $(VENV)/.python pyproject.toml make/environment.py
	@$(SET_UP) torch

$(VENV)/.core: $(VENV)/.torch
	@$(SET_UP) core

$(VENV)/.built: $(VENV)/.core $(SOURCES)
	@$(SET_UP) built

$(VENV)/.demo: $(VENV)/.core
	@$(SET_UP) demo

$(VENV)/.test: $(VENV)/.core
	@$(SET_UP) test

$(VENV)/.bench: $(VENV)/.core
	@$(SET_UP) bench

$(VENV)/.lint: $(VENV)/.python pyproject.toml
	@$(SET_UP) lint

$(VENV)/.docs: $(VENV)/.python pyproject.toml
	@$(SET_UP) docs
