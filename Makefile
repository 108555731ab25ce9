# `make quickstart` and `make test` do all their own set-up in .venv and may be run in either order. A set-up that was
# interrupted is taken up again; a finished one is repeated only when what is installed or compiled changed.
# The network is needed for that installation alone.

PYTHON ?= $(or $(shell command -v python3.11),python3)
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
JUNIT := build/junit.xml
NATIVE := $(wildcard $(addprefix distill/engine/kernels/native/,*.cpp *.h isa/*.h))
INSTALLED_FROM := pyproject.toml constraints.txt setup.py $(NATIVE)
# A file a process, in the order of their names: e2e/, whose files hold few and long tests, before unit/. One process more
# than there are processors, up to four: many tests wait for others that they start.
PARALLEL := -n $(shell $(PYTHON) -c 'import os; print(min(4, 1 + (os.cpu_count() or 1)))') --dist loadfile --no-loadscope-reorder
SOURCES := $(wildcard distill tests tools perf cli.py setup.py)

.PHONY: quickstart test test-slow lint format docs clean
.DELETE_ON_ERROR:

quickstart: .venv/installed
	$(OFFLINE) $(BIN)/distill run tiny

test: .venv/installed-dev # `lint` is one of the tests
	rm -f $(JUNIT)
	$(OFFLINE) $(BIN)/python -m pytest $(PARALLEL) -m 'not slow' --junitxml $(JUNIT) $(PYTEST_ARGS)

# What takes minutes and rarely breaks: run by hand before a release.
test-slow: .venv/installed-dev
	$(OFFLINE) $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal -m slow $(PYTEST_ARGS)

lint: .venv/installed-dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)
	$(BIN)/mypy

format: .venv/installed-dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/clang-format -i $(NATIVE)

docs: .venv/installed-dev # into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

clean: # not runs/: what was computed is the user's
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# A venv whose creation was cut off has a python but no working pip; --clear starts it over.
define VENV
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=…")'
$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
@echo "installing into .venv (some minutes the first time)"
endef

.venv/installed: $(INSTALLED_FROM)
	$(VENV)
	$(INSTALL) -e .
	touch $@

# Holds all that `.venv/installed` does, which is therefore not made first: the kernels would be compiled twice.
.venv/installed-dev: $(INSTALLED_FROM)
	$(VENV)
	$(INSTALL) -e '.[dev]'
	touch .venv/installed $@
