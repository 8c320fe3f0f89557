# Everything sets itself up: `make quickstart` and `make test` work in a fresh clone with Python >= 3.11 and make alone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# torch threads: the models in the tests are so small that a second thread only costs
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
HOST_TESTS := $(ONE_THREAD) $(BIN)/python -m pytest tests/host

.PHONY: help quickstart test check style test-host test-slow test-gpu bench docs notebooks clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

# the stamp is older than its sources when pyproject.toml or a pinned version changed
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: $(VENV)/.installed  ## dense models -> mixture -> fine-tune -> reload -> generate, on real text (10 minutes)
	$(BIN)/hf-moe quickstart $(ARGS)

test: check  ## everything that CI runs
	$(ONE_THREAD) $(BIN)/python -m pytest --numprocesses 2 --durations 15
	$(HOST_TESTS) -q -m fast --architecture=bam

check: $(VENV)/.installed  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

style: $(VENV)/.installed  ## fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-host: $(VENV)/.installed  ## Transformers' own model tests over every architecture, every skip with its reason
	$(HOST_TESTS) -q -rs

test-slow: $(VENV)/.installed  ## the tests marked slow
	$(ONE_THREAD) $(BIN)/python -m pytest --numprocesses 2 -m slow

test-gpu: $(VENV)/.installed  ## the tests that need CUDA: kernels against their twins in torch, every mixer, offloaded caches
	$(BIN)/python -m pytest -m gpu

bench: $(VENV)/.installed  ## our blocks next to Transformers', as ratios
	$(BIN)/python -m benchmarks.feed_forward
	$(BIN)/python -m benchmarks.mixers

docs: $(VENV)/.installed  ## the documentation site, in build/site
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

notebooks: $(VENV)/.installed  ## run all notebooks
	$(ONE_THREAD) $(BIN)/python -m pytest tests/test_notebooks.py -m 'slow or not slow'

clean:  ## remove the environment and all caches
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
