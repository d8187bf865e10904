# `make install`, `make demo`, `make test`: each makes .venv when it is missing. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Three test files at once, since many wait for clusters and jobs; each test process computes on one thread. The longest
# files begin first (tests/conftest.py): xdist would begin with the files that have most tests.
TESTS  := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
AT_ONCE := --dist loadfile --no-loadscope-reorder

.PHONY: help install demo test test-all lint check format benchmark methods gpu-check docs constraints chaos fuzz slurm-cluster ray-cluster clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

install: $(STAMP)  ## make .venv and install the versions that constraints/ has for its Python

$(STAMP): setup.cfg pyproject.toml $(wildcard constraints/*.txt)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c $$($(BIN)/python constraints/choose.py) -e '.[dev]'
	touch $(STAMP)

TESTED := \# Tested together; made by `make constraints`. CUDA libraries are left out: each build of torch names its own.

# what a file pins already stays unless it no longer fits; UPGRADE=--upgrade takes the newest of everything
constraints:  ## resolve the versions of each supported Python anew, with uv
	for v in 3.10 3.11 3.12 3.13; do \
	  uv pip compile -q $(UPGRADE) pyproject.toml --extra dev --extra docs --python-version $$v --no-header \
	    --no-annotate --python-platform x86_64-manylinux_2_28 -o constraints/py$$(echo $$v | tr -d .).txt || exit 1; \
	done
	sed -i -E -e '/^(nvidia-|triton=|cuda-|setuptools=)/d' -e '1i $(TESTED)' constraints/py*.txt

demo: install  ## the whole method on the embedded data set (about 5 minutes on 2 cores)
	$(BIN)/python -m fine_dist demo

test: install  ## the test suite, clusters where this machine has them
	$(TESTS) -n 3 $(AT_ONCE) -m "not slow and not benchmark"

test-all: install  ## the slow tests as well: the demo over three seeds
	$(TESTS) -m "not benchmark"

lint: install  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy fine_dist

check: lint  ## lint, and the tests that take seconds
	$(TESTS) -n 2 $(AT_ONCE) -m "not slow and not long and not cluster and not benchmark and not distributed"

docs: install  ## the docs as a site, in build/site
	$(BIN)/python -m pip install -q -e '.[docs]'
	$(BIN)/python docs/site.py build/docs
	$(BIN)/python -m mkdocs build --strict

format: install  ## rewrite with ruff
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

benchmark: install  ## every benchmark, to runs/benchmark
	$(BIN)/python -m benchmarks speed --json runs/benchmark/speed.json
	$(BIN)/python -m benchmarks data --json runs/benchmark/data.json
	$(BIN)/python -m benchmarks fanout --json runs/benchmark/fanout.json
	$(BIN)/python -m benchmarks metrics --json runs/benchmark/metrics.json
	$(BIN)/python -m benchmarks sample --json runs/benchmark/sample.json
	$(BIN)/python -m benchmarks creative --json runs/benchmark/creative.json

methods: install  ## every method and control on digits, to runs/benchmark/digits (about 45 minutes on 2 quiet cores)
	$(BIN)/python -m fine_dist.study --config configs/benchmark/digits.yaml

gpu-check: install  ## tests and benchmarks on one GPU, to docs/figures/gpu.json
	$(BIN)/python -m benchmarks gpu

fuzz: install  ## forty times the suite's hostile input, counted in docs/reliability.md (about an hour on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz_table --times 40

chaos: install  ## 100 nights of 30 random faults each, compared byte by byte; it resumes (some hours on 2 cores)
	$(BIN)/python -m tests.chaos.chaos --rounds 100 --record runs/chaos.jsonl

slurm-cluster: install  ## four virtual SLURM nodes on this machine until Ctrl-C (as root)
	$(BIN)/python slurm/local_cluster.py

ray-cluster: install  ## two Ray nodes on loopback until Ctrl-C
	$(BIN)/python -m fine_dist.launchers.local_ray

clean:  ## remove what the demo and the benchmarks wrote
	rm -rf runs data
