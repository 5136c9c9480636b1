# Everything a checkout needs: `make help` lists the targets. pip's own settings (index, cache, proxy) are honoured.

STUDY ?= benchmarks/world/demo.toml
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench clean browser prometheus

help: ## what there is
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 18

demo: .venv/.run ## install into .venv, edit the built-in model a hundred times, score it, report
	@$(BIN)/raysys run $(STUDY)

test: .venv/.dev browser prometheus lint ## install with what the tests need, check style, types and imports, run the tests
	@$(BIN)/python -m pytest

lint: .venv/.dev ## style, types, import directions
	@echo "ruff"; $(BIN)/ruff check --quiet --output-format concise . && $(BIN)/ruff format --quiet --check --output-format concise .
	@echo "mypy"; $(BIN)/mypy --no-error-summary
	@echo "imports"; $(BIN)/lint-imports --no-logo >.venv/imports.log || { cat .venv/imports.log; exit 1; }

bench: .venv/.run ## what the main job costs on this machine: edits, scoring, dispatch
	@$(BIN)/python -m tests.bench $(STUDY)

format: .venv/.dev ## put the code into the house's layout
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format .

clean: ## remove the environment, caches and builds (studies under runs/ stay)
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .grimp_cache dist build

# --- the environment -------------------------------------------------------------------------------------------------

# PYTHON=... chooses the interpreter; otherwise python3 if it will do, else the newest that does.
CANDIDATES := $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.10)

.venv/bin/python:
	@for python in $(CANDIDATES); do \
	  if $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then \
	    echo "environment: .venv with $$($$python --version)"; exec $$python -m venv .venv; \
	  fi; \
	done; \
	echo "raysys needs Python 3.10 or newer with venv and ensurepip; none of these will do: $(CANDIDATES)." >&2; \
	echo "Install one (Debian, Ubuntu: apt-get install python3 python3-venv) or name it: make PYTHON=/path/to/python3" >&2; \
	exit 1

.venv/.run: pyproject.toml constraints.txt | .venv/bin/python
	@$(call install,.)
	@touch $@

.venv/.dev: pyproject.toml constraints.txt | .venv/bin/python
	@$(call install,.[dev$(comma)harness])
	@touch $@ .venv/.run

# DeepSpeed comes as source; no operator of it is compiled ahead (DS_BUILD_OPS=0).
comma := ,
install = echo "installing $(1) with its pinned dependencies (once; a few minutes)"; \
	DS_BUILD_OPS=0 PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -qq -c constraints.txt -e '$(1)'

# The report's page is tested in a real browser.
browser: | .venv/bin/python
	@if command -v chromedriver >/dev/null; then \
	  for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing Chromium for the tests of the report's page"; \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver; } \
	    >.venv/chromium.log 2>&1 || echo "Chromium could not be installed (.venv/chromium.log): its tests are skipped"; \
	else \
	  echo "no Chromium with its chromedriver on PATH: the tests of the report's page are skipped"; \
	fi

# Metrics are tested with a real Prometheus: Debian's package, unpacked into .venv, so that no service is installed.
prometheus: | .venv/bin/python
	@if { command -v prometheus && command -v promtool; } >/dev/null || [ -x .venv/prometheus/usr/bin/promtool ]; then exit 0; fi; \
	if command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null; then \
	  echo "unpacking Prometheus for the tests of the metrics"; mkdir -p .venv/prometheus; \
	  { { [ "$$(id -u)" != 0 ] || apt-get update -qq; } && cd .venv/prometheus && apt-get download -qq prometheus && \
	    dpkg-deb -x prometheus_*.deb .; } >.venv/prometheus.log 2>&1 \
	    || echo "Prometheus could not be fetched (.venv/prometheus.log): its tests are skipped"; \
	else \
	  echo "no Prometheus with its promtool on PATH: the tests of the metrics are skipped"; \
	fi
