# make demo   train, sample and score a small Switch-DiT on real digits, on this machine
# make test   all that is checked without a GPU in minutes
#
# At full size: extract-latents, train, sample, eval-fid, tensorboard. `make <door>` alone prints that door's help.

SHELL := /bin/bash
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow faults parity soak bench lint extract-latents train sample eval-fid tensorboard

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | sed -n '1,/^$$/p'
	@echo "doors: extract-latents train sample eval-fid tensorboard; for developers: bench faults lint parity setup soak test-slow"

setup:
	@tools/setup_environment.sh

demo: setup
	@$(BIN)/python tools/demo.py

test: setup
	@$(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

# what takes minutes: the metric protocol on a full-size network, a comparison of systems, more processes and precisions;
# then a search for inputs that break a property, other ones each time
test-slow: setup
	@$(BIN)/python -m pytest -q -m slow
	@$(BIN)/python -m pytest -q -m "hypothesis and not slow" -n 2 --hypothesis-profile search

# 100 tiny trainings, each killed or damaged at a random point and resumed (5 to 10 minutes): [ARGS="--runs 200 --seed 1"]
faults: setup
	@$(BIN)/python tests/fault_campaign.py --runs 100 $(ARGS)

# gradients of every combination of ZeRO, ep_size, dispatch, precision, ... against one process (an hour or more; ARGS=--sample)
parity: setup
	@$(BIN)/python tests/gradient_parity.py $(ARGS)

# 20,000 steps on two processes, whose memory and open files must not grow (half an hour): [ARGS="--steps 3000"]
soak: setup
	@$(BIN)/python tests/soak.py $(ARGS)

# [WHAT=expert_mix|step|sampling|metrics|latents|scaling] [ARGS="..."]: the mixture layer, a training step, a sampling step,
# each beside what it is compared with (minutes); metrics on 50,000 synthetic features (5 to 10 minutes), reading latents,
# weak scaling on this machine
bench: setup
	@$(BIN)/python tools/bench_$(or $(WHAT),metrics).py $(ARGS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

# DATA=folder, .tar or .zip of images  OUT=folder  VAE=folder or hub name  [IMAGE_SIZE=256] [NPROC=8] [ARGS="..."]
# or, of latents that are there, OUT=folder ARGS=--verify (or --stats)
extract-latents: setup
ifneq ($(and $(OUT),$(findstring --verify,$(ARGS))$(findstring --stats,$(ARGS))),)
	@$(BIN)/python tools/extract_latents.py --out "$(OUT)" $(ARGS)
else ifneq ($(and $(DATA),$(OUT),$(VAE)),)
	@$(if $(NPROC),NPROC=$(NPROC)) launchers/single_node.sh tools/extract_latents.py --data "$(DATA)" --out "$(OUT)" --vae "$(VAE)" \
	    $(if $(IMAGE_SIZE),--image-size $(IMAGE_SIZE)) $(ARGS)
else
	@$(BIN)/python tools/extract_latents.py --help; echo "usage: make extract-latents DATA=dir OUT=dir VAE=path-or-name"; exit 2
endif

# CONFIG=switchdit/configs/X.yaml  DS_CONFIG=ds_configs/Y.json  [NPROC=8] [RESUME=auto] [ARGS="train.lr=1e-4 ..."]
train: setup
ifneq ($(and $(CONFIG),$(DS_CONFIG)),)
	@$(if $(NPROC),NPROC=$(NPROC)) launchers/single_node.sh switchdit/train.py --config "$(CONFIG)" --deepspeed_config "$(DS_CONFIG)" \
	    $(if $(RESUME),--resume $(RESUME)) $(ARGS)
else
	@$(BIN)/python switchdit/train.py --help; echo "usage: make train CONFIG=file.yaml DS_CONFIG=file.json [NPROC=8] [RESUME=auto]"; exit 2
endif

# CKPT=run or checkpoint folder  OUT=samples.npz  [NUM=50000] [NPROC=8] [ARGS="sample.cfg_scale=1.5 ..."]
# or, of published weights, WEIGHTS=file  CONFIG=switchdit/configs/X.yaml  instead of CKPT
source = $(if $(CKPT),--checkpoint "$(CKPT)",$(if $(and $(WEIGHTS),$(CONFIG)),--weights "$(WEIGHTS)" --config "$(CONFIG)"))
sample: setup
ifneq ($(and $(source),$(OUT)),)
	@$(if $(NPROC),NPROC=$(NPROC)) launchers/single_node.sh switchdit/sample.py $(source) --out "$(OUT)" \
	    $(if $(NUM),--num-samples $(NUM)) $(ARGS)
else
	@$(BIN)/python switchdit/sample.py --help; echo "usage: make sample CKPT=dir (or WEIGHTS=file CONFIG=file.yaml) OUT=samples.npz [NUM=50000] [NPROC=8]"; exit 2
endif

# REF=ref.npz  SAMPLES=samples.npz  [INCEPTION=file] [OUT=metrics.json] [NPROC=8] [ARGS="..."]
eval-fid: setup
ifneq ($(and $(REF),$(SAMPLES)),)
	@$(if $(NPROC),NPROC=$(NPROC) launchers/single_node.sh,$(BIN)/python) tools/eval_fid.py --ref "$(REF)" --samples "$(SAMPLES)" $(if $(INCEPTION),--inception "$(INCEPTION)") \
	    $(if $(OUT),--out "$(OUT)") $(ARGS)
else
	@$(BIN)/python tools/eval_fid.py --help; echo "usage: make eval-fid REF=ref.npz SAMPLES=samples.npz [INCEPTION=file] [OUT=metrics.json]"; exit 2
endif

# [LOGDIR=runs] [PORT=6006]; shown to this machine only
tensorboard: setup
	@$(BIN)/tensorboard --logdir "$(or $(LOGDIR),runs)" --host localhost --port "$(or $(PORT),6006)"
