# All commands of the project. `make` alone lists them.

PYTHON ?= python3
DOCKER ?= docker
PORT ?= 3000
BUNDLE ?= bundle
RUN ?= runs/latest
ifndef RECIPE
RECIPE := $(if $(value DATA),quick,demo)
endif
OUT ?= scores.csv
IMAGE ?= fledge
TARGET ?= cpu
EXTRAS ?=
BASE_IMAGE ?= python:3.11-slim

COMMA := ,
BIN := .venv/bin
FLEDGE := $(BIN)/fledge
INSTALLED := .venv/.installed
FUZZER := .venv/.fuzzer
VERSION = $(shell sed -nE 's/^__version__ = "(.*)"/\1/p' serving/__init__.py)
REVISION = $(shell git rev-parse HEAD 2>/dev/null || echo unknown)
COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header $(ARGS)
# COVERAGE=1 measures the branch coverage of a test command, child processes included; see `make coverage`.
PYTEST := $(BIN)/$(if $(COVERAGE),coverage run -m )pytest
OFFLINE := not docker and not gpu and not network
# The value of a variable as one word of a shell command: paths may have spaces, quotes and dollar signs.
quote = '$(subst ','\'',$(value $(1)))'
# `make train data=photos` would train on other photos, as make's variables are in capitals.
$(foreach pair,data/DATA input/INPUT bundle/BUNDLE run/RUN recipe/RECIPE out/OUT port/PORT args/ARGS image/IMAGE,\
  $(if $(filter command,$(origin $(firstword $(subst /, ,$(pair))))),\
    $(error write $(lastword $(subst /, ,$(pair)))= in capitals, not $(firstword $(subst /, ,$(pair)))=)))

.DEFAULT_GOAL := help
.PHONY: help install demo train export serve score test test-process test-slow test-docker coverage check format bench soak siege fuzz fuzz-service pictures \
  bento image run-image sbom audit lock
.DELETE_ON_ERROR:

help: ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(INSTALLED) ## Create .venv from the hash-locked requirements (PYTHON=python3.12)

$(INSTALLED): pyproject.toml requirements/dev.txt requirements/uv.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || \
	  { echo "make: $(PYTHON) is not Python 3.11 to 3.13: name one that is, as in make install PYTHON=python3.12" >&2; exit 2; }
	@rm -f $@
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements/uv.txt
	@# uv needs a quarter of pip's time; pip also reads indexes from its own configuration.
	$(BIN)/uv pip sync --python $(BIN)/python --require-hashes --compile-bytecode requirements/dev.txt || \
	  $(BIN)/python -m pip install --disable-pip-version-check --require-hashes --requirement requirements/dev.txt
	$(BIN)/uv pip install --python $(BIN)/python --quiet --offline --no-deps --no-build-isolation --editable .
	@touch $@

demo: install ## Train on painted flowers, export, serve, classify one photo, all in demo/
	@rm -rf demo
	$(FLEDGE) train demo --data sample --out demo/run $(ARGS)
	$(FLEDGE) export demo/run --out demo/bundle
	$(BIN)/python deploy/demo.py demo/bundle

train: install ## Train on the built-in photos, or DATA=folder RECIPE=quick ARGS="key=value …"
	$(FLEDGE) train $(call quote,RECIPE) --data $(if $(value DATA),$(call quote,DATA),sample) $(ARGS)

export: install ## Turn RUN=runs/latest into the verified BUNDLE=bundle
	$(FLEDGE) export $(call quote,RUN) --out $(call quote,BUNDLE) $(ARGS)

serve: install ## Serve BUNDLE=bundle over HTTP on PORT=3000
	$(FLEDGE) serve $(call quote,BUNDLE) --port $(PORT) $(ARGS)

score: install ## Score every image of INPUT=folder into OUT=scores.csv
	@test -n $(call quote,INPUT) || { echo "make: name the images, as in make score INPUT=photos" >&2; exit 2; }
	$(FLEDGE) score $(call quote,INPUT) --bundle $(call quote,BUNDLE) --out $(call quote,OUT) $(ARGS)

test: install ## Run the quick tests, 4 minutes on 2 cores: offline, no GPU
	$(PYTEST) -n auto --dist loadfile -m "not process and not slow and $(OFFLINE)" $(ARGS)

test-process: install ## Run the tests marked process, 5 minutes: kills, torchrun, servers, trainings on photos
	$(PYTEST) -n auto --dist loadfile -m "process and not slow and $(OFFLINE)" $(ARGS)

test-slow: install ## Run the tests marked slow, 5 minutes: every network family, Ray
	$(PYTEST) -n auto --dist worksteal -m "slow and $(OFFLINE)" $(ARGS)

test-docker: install ## Test the image and deploy/, 5 minutes; needs a container engine (DOCKER=docker)
	DOCKER=$(call quote,DOCKER) BASE_IMAGE=$(call quote,BASE_IMAGE) $(BIN)/pytest tests/docker tests/deploy $(ARGS)

coverage: install ## Report the branch coverage of the tests that ran with COVERAGE=1
	@$(BIN)/coverage combine --quiet --append || test -f build/coverage/data # nothing new
	@$(BIN)/coverage report --show-missing --skip-covered
	@# Floors: they only rise.
	@for floor in serving=95 training=97 export=97; do \
	  echo "$${floor%=*}: $$($(BIN)/coverage report --include="$${floor%=*}/*" --format=total) %, floor $${floor#*=} %"; \
	  $(BIN)/coverage report --include="$${floor%=*}/*" --fail-under="$${floor#*=}" >/dev/null || exit; \
	done

check: install ## Check format, lint, types and import contracts
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install ## Format the code and fix what ruff can fix
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

bench: install ## Compare training with fastai and a plain torch loop: DATA=photos ARGS="--split … --weights …"
	$(BIN)/python -m benchmarks.training.race $(if $(value DATA),--data $(call quote,DATA)) $(ARGS)

soak: install ## Ten minutes of overload, bad input and disconnects: BUNDLE=bundle DATA=photos
	@test -n $(call quote,DATA) || { echo "make: name some photos, as in make soak DATA=photos" >&2; exit 2; }
	$(BIN)/python -m benchmarks.serving.soak --bundle $(call quote,BUNDLE) --photos $(call quote,DATA) $(ARGS)

siege: install ## Ten minutes of attacks beside honest callers: BUNDLE=bundle DATA=photos
	@test -n $(call quote,DATA) || { echo "make: name some photos, as in make siege DATA=photos" >&2; exit 2; }
	$(BIN)/python -m benchmarks.serving.siege --bundle $(call quote,BUNDLE) --photos $(call quote,DATA) $(ARGS)

fuzz: $(FUZZER) ## Fuzz every parser, guided by coverage: ARGS="--seconds 60"
	$(BIN)/python -m tests.fuzz --all $(ARGS)

$(FUZZER): $(INSTALLED) requirements/fuzz.txt
	$(BIN)/uv pip install --python $(BIN)/python --quiet --require-hashes --requirement requirements/fuzz.txt
	@touch $@

fuzz-service: install ## Mutated odd images against a running service: ARGS="--cases 100000 --seed 1"
	$(BIN)/python -m tests.robustness.fuzz $(ARGS)

pictures: demo ## Draw the pictures of the README again; needs Chromium
	$(BIN)/python -m docs.pictures demo/run demo/bundle

bento: install ## Build a Bento of the service with BUNDLE=bundle inside (EXTRAS=heif,jxl)
	$(FLEDGE) verify $(call quote,BUNDLE)
	@rm -rf build/bento && mkdir -p build/bento/requirements
	@cp -R bentofile.yaml README.md serving build/bento
	@cat requirements/serving.txt $(patsubst %,requirements/%.txt,$(subst $(COMMA), ,$(EXTRAS))) >build/bento/requirements/serving.txt
	@cp -R $(call quote,BUNDLE) build/bento/bundle
	BENTOML_DO_NOT_TRACK=True $(BIN)/bentoml build $(ARGS) build/bento

image: ## Build the image IMAGE=fledge (TARGET=gpu, EXTRAS=heif,jxl, BUNDLE=… to include it, BASE_IMAGE=…)
	DOCKER_BUILDKIT=1 $(DOCKER) build --target $(TARGET) --tag $(IMAGE) --build-arg BASE_IMAGE=$(BASE_IMAGE) \
	  --build-arg EXTRAS=$(EXTRAS) --build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) $(DOCKER_BUILD_ARGS) .
ifneq ($(origin BUNDLE),file)
	DOCKER_BUILDKIT=1 $(DOCKER) build --file deploy/image/bundle.Dockerfile --tag $(IMAGE) \
	  --build-arg IMAGE=$(IMAGE) $(call quote,BUNDLE)
endif

run-image: ## Serve BUNDLE=bundle from the image on PORT=3000 of this machine: read-only, unprivileged
	@test -d $(call quote,BUNDLE) || { echo "make: there is no bundle" $(call quote,BUNDLE) "- make one with make export" >&2; exit 2; }
	$(DOCKER) run --rm --stop-timeout 35 --publish 127.0.0.1:$(PORT):3000 --env FLEDGE_HOSTS=localhost --volume "$$(cd $(call quote,BUNDLE) && pwd)":/bundle:ro \
	  --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges $(DOCKER_RUN_ARGS) $(IMAGE) $(ARGS)

sbom: install ## List the packages of the image IMAGE=fledge in build/sbom.json, as CycloneDX
	@rm -rf build/sbom && mkdir -p build
	@$(PYTHON) -m venv --without-pip build/sbom
	@# The packages' metadata from the image, where the tool looks for it.
	@$(DOCKER) run --rm --network none --entrypoint sh $(IMAGE) -c \
	  'cd /opt/venv/lib/python3*/site-packages && tar -c *.dist-info' >build/sbom/packages.tar
	@tar -x -f build/sbom/packages.tar -C build/sbom/lib/python3*/site-packages
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
	  --output-file build/sbom.json $(ARGS) build/sbom
	@rm -rf build/sbom

audit: install ## Check the locked packages of the service for known vulnerabilities
	$(BIN)/pip-audit --disable-pip --require-hashes --requirement requirements/serving-cpu.txt \
	  --requirement requirements/serving-gpu.txt --requirement requirements/heif.txt \
	  --requirement requirements/jxl.txt $(ARGS)

lock: install ## Renew the lock files; ARGS=--upgrade takes the newest versions
	$(COMPILE) pyproject.toml --extra train --extra dev --output-file requirements/dev.txt
	$(COMPILE) pyproject.toml --output-file requirements/serving.txt
	$(COMPILE) pyproject.toml --overrides requirements/cpu-overrides.txt --output-file requirements/serving-cpu.txt
	$(COMPILE) pyproject.toml --extra gpu --constraints requirements/serving.txt --no-annotate \
	  --output-file requirements/serving-gpu.txt
	@# What an extra adds to these, in the versions of dev.txt.
	echo pillow-heif | $(COMPILE) - --no-deps --constraints requirements/dev.txt --no-annotate --output-file requirements/heif.txt
	echo pillow-jxl-plugin | $(COMPILE) - --no-deps --constraints requirements/dev.txt --no-annotate --output-file requirements/jxl.txt
	$(COMPILE) --group fuzz --constraints requirements/dev.txt --no-annotate --output-file requirements/fuzz.txt
	$(COMPILE) requirements/uv.in --constraints requirements/dev.txt --no-annotate --output-file requirements/uv.txt
