# nanoChimera: `make demo` to see it train and write, `make test` to check it. Both set up .venv by themselves.

PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadgroup --max-worker-restart 0
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

# the corpus and the GPT-2 tokenizer, where they are kept beside the repository
ifneq ($(wildcard ../shared/data/tinyshakespeare.txt),)
export TINYSHAKESPEARE ?= $(CURDIR)/../shared/data/tinyshakespeare.txt
endif
ifneq ($(wildcard ../shared/data/tiktoken_cache),)
export TIKTOKEN_CACHE_DIR ?= $(CURDIR)/../shared/data/tiktoken_cache
endif

.PHONY: help demo check test lint bench report tables readme clean

help:  ## list these commands (the default)
	@awk -F ':.*  ## ' '/^[a-z]+:.*  ## / { printf "make %-6s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.core data/shakespeare_char/train.bin  ## train a small model on Shakespeare (2 minutes on a CPU), sample
	config=$$($(BIN)/python -c "import torch; print('train_shakespeare_char' if torch.cuda.is_available() else 'demo')") && \
	$(BIN)/python train.py config/$$config.py --out_dir=out-demo && \
	$(BIN)/python sample.py --out_dir=out-demo --num_samples=1

check: $(VENV)/.dev  ## ruff and the fast tests; V=mhc,kan: all contracts of these variants instead
	$(BIN)/ruff check -q . && $(BIN)/ruff format -q --check .
ifdef V
	$(PYTEST) tests/contracts --variant=$(V) $(ARGS)
else
	$(PYTEST) -m "not slow" $(ARGS)
endif

test: $(VENV)/.dev  ## run the whole test suite; ARGS="-k cache -x" goes to pytest
	$(PYTEST) $(ARGS)

lint: $(VENV)/.dev  ## ruff: errors and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# --mix: these records are from before the code that made them was recorded
BENCH := $(BIN)/python -m lab.bench

bench: $(VENV)/.dev  ## speeds that users wait for, in 10 minutes, added to docs/results/bench.jsonl
	$(BENCH) step --repeats=5 --memory=False --record
	$(BENCH) attention --only=512,1024,8192 --repeats=5 --memory=False --record
	$(BENCH) decode --repeats=3 --memory=False --record
	$(BENCH) optimizers --repeats=7 --memory=False --record

REPORT := $(BIN)/python -m lab.ablate --report --mix

report: $(VENV)/.dev  ## comparisons in docs/results.md, plots and pages docs/*.html, from docs/results
	$(REPORT) --learning_rates=1e-3,3e-3
	$(REPORT) --out_dir=out-local
	$(REPORT) --out_dir=out-ablation-512 --learning_rates=3e-3
	$(REPORT) --out_dir=out-char
	$(REPORT) --out_dir=out-modern
	$(REPORT) --out_dir=out-modern-muon
	$(BIN)/python -m lab.rungs --mix

tables: $(VENV)/.dev  ## after a new variant: the record of all rows and the covering array in tests/contracts
	PYTHONPATH=.:tests $(BIN)/python tests/contracts/test_record.py
	PYTHONPATH=.:tests $(BIN)/python tests/contracts/covering.py

readme: $(VENV)/.core  ## the excerpts of --help in README.md, as the scripts print them
	$(BIN)/python -m lab.readme

clean:  ## remove .venv and caches; data and runs stay
	rm -rf $(VENV) *.egg-info build .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# pip comes last when a venv is made, so an interrupted one is made again
$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# stamps: installed once, and again when the dependencies change
$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) -e .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) -e '.[dev]'
	touch $(VENV)/.core $@

data/shakespeare_char/train.bin: | $(VENV)/.core
	$(BIN)/python data/shakespeare_char/prepare.py
