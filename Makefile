# make demo: the whole two-stage run on real drawings, on the CPU.  make test: all checks but the slow ones and the longest of
# the promises'.  make test-faults: all of those, which break runs in every way that is promised to be survived.
# make setup: the environment, in .venv, with the newest Python of 3.11 to 3.13 that is here, or make setup PYTHON=...
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# "yes" where there is an NVIDIA GPU; make setup CUDA=yes installs for one that is elsewhere, CUDA= for none
CUDA ?= $(shell if nvidia-smi -L >/dev/null 2>&1 || test -d /proc/driver/nvidia; then echo yes; fi)
TRAIN := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process 2 train.py
STAGE1 := configs/demo_stage1.yaml
STAGE2 := configs/demo_stage2.yaml

# the licence's text is not part of this repository: make demo LICENSE_FILE=faipl-1.0-sd.md builds the published folder
PUBLISH := $(BIN)/python scripts/publish.py demo_run/runs/stage2_refine_unet
PUBLISH_LICENSED = $(PUBLISH) --license-file "$(LICENSE_FILE)" publish.source_url=https://example.org/the-demo \
	--acknowledge-base-terms "made from nothing by scripts/make_tiny_base.py: nobody else's terms apply"

.PHONY: setup setup-dev demo publish-demo test test-slow test-faults full-size check clean-demo

setup: .venv/installed
setup-dev: .venv/installed-dev

# torch first and by its exact version: the CPU build where one is offered, the CUDA build on a CUDA machine
.venv/installed: constraints.txt pyproject.toml
	@sh scripts/make_venv.sh "$(PYTHON)"
	@echo "installing PyTorch: seconds for a build of the CPU, minutes and 3 GB of downloads for one with CUDA"
	@$(PIP) torch==2.13.0
	@echo "installing the other libraries"
	@$(PIP) --constraint constraints.txt --editable .
	@$(if $(CUDA),$(INSTALL_FOR_CUDA),echo "no NVIDIA GPU is here: without bitsandbytes and xformers")
	@touch $@
	@echo "done: .venv; next: make demo, or . .venv/bin/activate for the commands of the README"

# neither is needed but for optim.name=adamw8bit and model.attention=xformers, which say so themselves
INSTALL_FOR_CUDA = for package in bitsandbytes xformers; do \
	echo "installing $$package for the NVIDIA GPU"; \
	$(PIP) --constraint constraints.txt $$package || echo "note: $$package could not be installed; all else works without it"; \
	done

.venv/installed-dev: .venv/installed
	@$(PIP) --constraint constraints.txt --editable '.[dev]'
# for CLIP's vocabulary, which its wheel holds and a test reads; its dependencies are not needed, and bring torchvision
	@$(PIP) --constraint constraints.txt --no-deps open_clip_torch
	@touch $@

# threads that sleep instead of spinning while they wait for each other: beside other work spinning costs a multiple
demo: export OMP_WAIT_POLICY := PASSIVE
demo: .venv/installed
	test -d demo_run/tiny_base || $(BIN)/python scripts/make_tiny_base.py demo_run/tiny_base
	$(BIN)/python scripts/build_shards.py $(STAGE1)
	$(TRAIN) $(STAGE1)
	$(BIN)/python scripts/export.py demo_run/runs/stage1_feature_alignment
	$(BIN)/python scripts/build_shards.py $(STAGE2)
	$(TRAIN) $(STAGE2)
	$(BIN)/python scripts/export.py demo_run/runs/stage2_refine_unet
	test -d demo_run/runs/stage2_refine_unet/export/samples || $(BIN)/python scripts/sample.py \
		demo_run/runs/stage2_refine_unet --prompts demo/prompts.txt
	@echo; echo "Publishing without the licence's text is refused, and says what is missing:"
	-$(PUBLISH)
	$(if $(LICENSE_FILE),$(PUBLISH_LICENSED),@echo "With it the folder is built, and nothing uploaded: make publish-demo LICENSE_FILE=faipl-1.0-sd.md")
	$(BIN)/python scripts/show_demo.py demo_run

# after make demo: the folder that strangers would get
publish-demo: .venv/installed
	$(if $(LICENSE_FILE),,$(error give the text of FAIPL-1.0-SD: make publish-demo LICENSE_FILE=faipl-1.0-sd.md))
	$(PUBLISH_LICENSED)

check: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# one thread a process: two processes of one thread finish sooner on 2 cores than one of two; where a test takes two threads,
# they sleep instead of spinning while they wait for each other
test: check
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not faults"

test-slow: .venv/installed-dev
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m slow

# a module for each promise; prints how often each was tried, and how often it failed
test-faults: .venv/installed-dev
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile tests/promises

# both stages at SDXL's full size on the CPU, with random weights: killed, resumed and exported; two idle cores,
# 20 GB of free memory and 45 GB of disk (TMPDIR), which are free again at the end
full-size: .venv/installed
	$(BIN)/python benchmarks/full_size.py

clean-demo:
	rm -rf demo_run
