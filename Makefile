# make demo | test | test-all | check | test-oldest | clean
# PYTHON: the interpreter that makes the environments (3.11 or newer). CPU=1: torch's CPU build, gigabytes smaller.
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
CPU_INDEX = https://download.pytorch.org/whl/cpu
OFFLINE = HF_HUB_OFFLINE=1
# Two files of tests at a time: a test uses one core.
BESIDE = -n 2 --dist loadfile
FAST = not slow and not gpu and not network and not unsloth and not llamacpp
SLOW = (slow or gpu) and not network and not unsloth and not llamacpp

.PHONY: demo test test-all test-slow check lint test-oldest clean help
.DELETE_ON_ERROR:

help:
	@sed -n '1,2s/^# //p' Makefile

demo: $(VENV)/.installed
	$(VENV)/bin/lowrank-tune demo

test: $(VENV)/.installed-dev
	$(OFFLINE) $(VENV)/bin/python -m pytest $(BESIDE) -m "$(FAST)"

test-all: test test-slow

# pytest ends with 5 where no test carries the mark: that is no failure.
test-slow: $(VENV)/.installed-trl
	$(OFFLINE) $(VENV)/bin/python -m pytest $(BESIDE) -m "$(SLOW)" || test $$? -eq 5

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

check: lint test

test-oldest: $(OLDEST)/.installed-dev
	$(OFFLINE) $(OLDEST)/bin/python -m pytest $(BESIDE) -m "$(FAST)"

# An environment is made once; the stamps install again when the dependencies change.
%/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'lowrank_tune needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...'; exit 1; }
	@$(PYTHON) -m venv $* || \
		{ rm -rf $*; echo 'Python lacks its venv module; install the package for it (python3-venv on Debian and Ubuntu).'; exit 1; }
	$(if $(CPU),$*/bin/python -m pip install torch -c constraints/newest.txt --index-url $(CPU_INDEX))

$(VENV)/.installed: pyproject.toml constraints/newest.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -e . -c constraints/newest.txt
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints/newest.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -e '.[dev]' -c constraints/newest.txt
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-trl: pyproject.toml constraints/newest.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -e '.[dev,trl]' -c constraints/newest.txt
	@touch $@ $(VENV)/.installed-dev $(VENV)/.installed

$(OLDEST)/.installed-dev: pyproject.toml constraints/oldest.txt | $(OLDEST)/bin/python
	$(OLDEST)/bin/python -m pip install -e '.[dev]' -c constraints/oldest.txt
	@touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find lowrank_tune tests -name __pycache__ -type d -prune -exec rm -rf {} +
