# PYTHON: the interpreter that makes the environments (3.11 or newer). CPU=1: torch's CPU build, gigabytes smaller.
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
OFFLINE = HF_HUB_OFFLINE=1
# The theme warns about a later mkdocs at each start; the version here is pinned.
MKDOCS = NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs
# Two files of tests at a time: a test uses one core.
BESIDE = -n 2 --dist loadfile
FAST = not slow and not gpu and not network and not unsloth and not llamacpp
SLOW = (slow or gpu) and not network and not unsloth and not llamacpp

.PHONY: help demo test test-all test-slow check lint test-oldest docs docs-serve dist release clean
.DELETE_ON_ERROR:
# Two targets must not install into one environment at the same time (make -j).
.NOTPARALLEL:

help: ## List the targets.
	@echo 'make TARGET [PYTHON=python3.12] [VENV=.venv] [CPU=1]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-12s %s\n", $$1, $$2}' Makefile
	@echo 'CPU=1 takes the CPU build of torch, gigabytes smaller, from $(CPU_INDEX)'

demo: $(VENV)/.installed ## Train the tiny base that ships with the package, on a CPU, without network.
	$(VENV)/bin/lowrank-tune demo

test: $(VENV)/.installed-dev ## The fast tests.
	$(OFFLINE) $(VENV)/bin/python -m pytest $(BESIDE) -m "$(FAST)"

test-all: test test-slow ## The fast and the slow tests.

# pytest ends with 5 where no test carries the mark: that is no failure.
test-slow: $(VENV)/.installed-all ## The slow tests.
	$(OFFLINE) $(VENV)/bin/python -m pytest $(BESIDE) -m "$(SLOW)" || test $$? -eq 5

lint: $(VENV)/.installed-dev ## ruff and mypy.
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy scripts

check: lint test ## ruff, mypy and the fast tests.

test-oldest: $(OLDEST)/.installed-dev ## The fast tests with the oldest supported versions, in an environment of their own.
	$(OFFLINE) $(OLDEST)/bin/python -m pytest $(BESIDE) -m "$(FAST)"

docs: $(VENV)/.installed-docs ## Build the documentation into site/; every warning is an error.
	$(MKDOCS) build --strict

docs-serve: $(VENV)/.installed-docs ## Serve the documentation on this machine, and build it again when a page changes.
	$(MKDOCS) serve

dist: $(VENV)/.installed-release ## Build the sdist and, from it, the wheel into dist/, and check their metadata.
	rm -rf dist
	$(VENV)/bin/python -m build --no-isolation
	$(VENV)/bin/python -m twine check --strict dist/*

release: $(VENV)/.installed-release ## Check everything that a release needs, and set its tag. It publishes nothing.
	$(VENV)/bin/python scripts/release.py $(if $(CPU),--torch-index $(CPU_INDEX))

# An environment is made once. `.empty` marks one in which nothing is installed yet. What an interrupted make left is made again.
%/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'lowrank_tune needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...'; exit 1; }
	@if test -e $*/pyvenv.cfg; then rm -rf $*; fi
	@$(PYTHON) -m venv $* || \
		{ rm -rf $*; echo 'Python lacks its venv module; install the package for it (python3-venv on Debian and Ubuntu).'; exit 1; }
	@touch $*/.empty

# $(call install,ENVIRONMENT,CONSTRAINTS) installs the kit with EXTRAS. With CPU=1 torch alone comes from PyTorch's own index, without its
# dependencies: that index lacks pinned versions of them. The second installation keeps this torch, because the constraint torch==2.13.0
# accepts 2.13.0+cpu.
define install
$(if $(CPU),@$(call install_cpu_torch,$(1),$(2)))
$(1)/bin/python -m pip install -e '.$(EXTRAS)' -c $(2)
@rm -f $(1)/.empty
@touch $@ $(INCLUDED)
endef

define install_cpu_torch
echo $(1)/bin/python -m pip install --no-deps torch -c $(2) --index-url $(CPU_INDEX); \
	$(1)/bin/python -m pip install --no-deps torch -c $(2) --index-url $(CPU_INDEX) || { \
	if test -e $(1)/.empty; then rm -rf $(1); fi; \
	{ echo 'CPU=1 takes torch from $(CPU_INDEX), and it could not be installed from there: pip wrote the reason above.'; \
	echo 'If this address cannot be reached, name a mirror of it (make CPU_INDEX=URL CPU=1 ...), or leave out CPU=1: torch then comes'; \
	echo 'from the package index, in its build for CUDA, which is gigabytes larger and also runs without a GPU.'; } >&2; \
	exit 1; }
endef

# The stamps install again when the dependencies change. INCLUDED: the stamps of what an installation contains too. Both
# are empty by default, whatever the environment has under these names.
EXTRAS =
INCLUDED =
STAMPS = $(VENV)/.installed $(addprefix $(VENV)/.installed-,dev docs release all)
$(STAMPS): INCLUDED = $(VENV)/.installed
$(VENV)/.installed-dev: EXTRAS = [dev]
$(VENV)/.installed-docs: EXTRAS = [docs]
$(VENV)/.installed-release: EXTRAS = [release]
$(VENV)/.installed-all: EXTRAS = [dev,trl,docs,release]
$(VENV)/.installed-all: INCLUDED = $(STAMPS)
$(OLDEST)/.installed-dev: EXTRAS = [dev]

$(STAMPS): pyproject.toml constraints/newest.txt | $(VENV)/bin/python
	$(call install,$(VENV),constraints/newest.txt)

$(OLDEST)/.installed-dev: pyproject.toml constraints/oldest.txt | $(OLDEST)/bin/python
	$(call install,$(OLDEST),constraints/oldest.txt)

clean: ## Remove the environments and everything that was built.
	rm -rf $(VENV) $(OLDEST) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find lowrank_tune tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
