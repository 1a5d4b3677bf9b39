# make demo      train one model at three sites on this machine (ARGS="--minutes 1 --json out.json")
# make test      all tests            make lint    ruff and mypy          make check    both
# make bench     the measured claims, quick forms

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=

.PHONY: demo test lint check bench nginx clean

demo: $(READY)
	@$(BIN)/isthmus demo $(ARGS)

# A worker a core and one more: much of the time is waiting. For one test in this process: ARGS="-n 0 tests/test_cli.py"
test: $(READY) nginx
	$(BIN)/python -m pytest -n $$(($$(getconf _NPROCESSORS_ONLN) + 1)) --dist worksteal $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: $(READY)
	@$(MAKE) --no-print-directory --jobs=2 lint test

bench: $(READY)
	$(BIN)/python -m benchmarks.merge --quick $(ARGS)
	$(BIN)/python -m benchmarks.codec --quick
	$(BIN)/python -m benchmarks.encode_device --quick
	PYTHON=$(BIN)/python benchmarks/gpu.sh --quick
	$(BIN)/python -m benchmarks.variants --quick
	$(BIN)/python -m benchmarks.round --quick
	$(BIN)/python -m benchmarks.memory --quick
	$(BIN)/python -m benchmarks.quality --quick
	$(BIN)/python -m benchmarks.kills --quick
	$(BIN)/python -m benchmarks.storm --quick
	$(BIN)/python -m benchmarks.joiner --quick
	$(BIN)/python -m benchmarks.continued --quick
	$(BIN)/python -m benchmarks.mixed --quick

# Made anew whenever what is installed could have changed; quick when it has not. A Debian without the
# python3-venv package cannot make environments; where we may, we install it, and else say so.
$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
		rm -rf $(VENV); \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			apt-get update -qq && apt-get install -y -qq python3-venv && $(PYTHON) -m venv $(VENV); \
		else \
			echo "isthmus: python3 cannot make environments here; install the package python3-venv" >&2; exit 2; \
		fi; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

# Tests of the cache run nginx. Where there is none, Debian's package is unpacked beside the environment: installed, it
# would start a server on this machine's port 80. Where it cannot be had the test is skipped.
nginx: $(READY)
	@PATH="$$PATH:/usr/sbin" command -v nginx >/dev/null || $(VENV)/nginx/usr/sbin/nginx -v 2>/dev/null || { \
		rm -rf $(VENV)/nginx && mkdir $(VENV)/nginx && cd $(VENV)/nginx && \
		{ [ "$$(id -u)" != 0 ] || timeout 120 apt-get update -qq; } && apt-get download -qq nginx && dpkg -x nginx_*.deb . && \
		usr/sbin/nginx -v; \
	} >/dev/null 2>&1 || echo "isthmus: no nginx here, so its tests are skipped; install the package nginx" >&2

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist *.egg-info
