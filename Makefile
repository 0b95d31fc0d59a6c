PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: env browser demo localize check test hosts lint bench gpu clean

env: .venv/installed

# fast-slic compiles from source and its own build set-up calls pip, so its build tools come first.
.venv/installed: requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -q $$(grep -E '^(setuptools|wheel|Cython|numpy)==' requirements.lock)
	$(BIN)/pip install --disable-pip-version-check -q --no-build-isolation -r requirements.lock
	touch $@

# For the tests of the report page, which say that they are skipped where there is none.
browser:
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do \
	  if command -v $$name; then exit 0; fi; \
	done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; \
	else \
	  echo "no browser for the tests of the report page; install chromium or google-chrome" >&2; \
	  exit 1; \
	fi

demo: env
	$(BIN)/python -m jobs.demo --output demo

# Boxes, overlays and masks of photographs, in boxes/: make localize IMAGES="photo.jpg folder/"
localize: env
	$(BIN)/python -m jobs.localize $(IMAGES)

# Two processes, each with the tests of a file; in either, tests that need Ray share one. The long
# files come first, so that neither process waits for the other.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Before each commit: linters, types and the fast tests.
check: lint
	$(PYTEST) -m "not slow and not hosts"

# Before a merge: every test but those of `hosts`.
test: env
	$(PYTEST) -m "not hosts"

# Hosts that die, stand still or lose their network during each of the jobs, and the head that dies;
# needs root and network namespaces. CI leaves out those marked slow.
FAULTS ?= hosts
hosts: env
	$(BIN)/python -m pytest -m "$(FAULTS)" tests/e2e/test_host_faults.py tests/pipeline/test_tasks.py

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: env
	$(BIN)/python -m benchmarks.loader
	$(BIN)/python -m benchmarks.preprocess --images 600 --rounds 2

# On a machine with a GPU: its tests and every rate there. Not run on a GPU yet.
gpu: env
	$(BIN)/python -m benchmarks.gpu

clean:
	rm -rf demo .pytest_cache .mypy_cache .ruff_cache
