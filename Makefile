# Every target sets up what it needs in .venv by itself: a Python of 3.11 or later is all that must be there.
SHELL := /bin/bash
ARGS ?=
BIN := .venv/bin

.PHONY: help demo check test test-long older newest chaos paired guest lint format bench docs clean

help: ## what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | column -t -s "$$(printf '\t')"

demo: .venv/demo.stamp ## the example fleet: server, worker, site and Flower, one rack into maintenance (ARGS=--once: then stop)
	$(BIN)/python -m example_project.demo $(ARGS)

check: .venv/lint.stamp ## before each commit, two minutes: lint, unit tests, the index's contract in memory and on one Valkey
	@$(MAKE) --no-print-directory lint
	GOALSTATE_TEST_LANES=memory,valkey $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not long" tests/unit tests/contract $(ARGS)

# Four at a time, however few the processors: tests that start processes mostly wait for them.
test: .venv/test.stamp ## all tests but the long ones (ARGS: more options for pytest)
	$(BIN)/python -m pytest -n 4 --dist loadgroup -m "not long" $(ARGS)

test-long: .venv/test.stamp ## the long state machines, kills and mutants too; about an hour
	GOALSTATE_TEST_PROFILE=long $(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

chaos: .venv/test.stamp ## pull every plug, and prove that nothing is lost (ARGS="--minutes 30 --seed 7 --broker rabbitmq")
	$(BIN)/python -m tests.chaos $(ARGS)

paired: .venv/test.stamp ## plain tasks under the same kills, cuts and full Redis, with an engine and without (ARGS="--lane full --seeds 5")
	$(BIN)/python -m tests.chaos.paired $(ARGS)

guest: .venv/test.stamp ## Celery's and kombu's own tests, with an engine on their apps and without (ARGS=--quick: a part)
	$(BIN)/python -m tests.guest $(ARGS)

older: .venv/bin/python ## a short lane on each older Celery that is supported, in .venv-celery-5.5 and the like
	$(BIN)/python -m tests.hosts older

newest: .venv/bin/python ## what breaks on pre-releases of celery, kombu, redis-py and Flower, in .venv-newest; never fails
	$(BIN)/python -m tests.hosts newest

lint: .venv/lint.stamp ## style, types, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/lint.stamp ## put the code into its one format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/test.stamp ## costs against plain Celery, as ratios; writes docs/benchmarks (ARGS=--peers: against other queues too)
	$(BIN)/python -m benchmarks $(ARGS)

docs: .venv/test.stamp ## run every example of README and docs
	$(BIN)/python -m pytest tests/docs $(ARGS)

clean: ## remove the environment and what tests and demo left
	rm -rf .venv .venv-* .hypothesis .mypy_cache .ruff_cache .pytest_cache .import_linter_cache example_project/var tests/output

.venv/bin/python:
	@set -e; for python in $${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do \
		if command -v $$python >/dev/null && $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "setting up .venv with $$($$python --version)"; \
			$$python -m venv --clear .venv && .venv/bin/python -m pip install --quiet --upgrade 'pip>=25.1'; \
			exit 0; \
		fi; \
	done; echo "celery-goalstate needs Python 3.11 or later; name one: make PYTHON=/path/to/python3" >&2; exit 1

# One stamp per dependency group of pyproject.toml: uv when it is there, else pip.
.venv/%.stamp: pyproject.toml | .venv/bin/python
	@if command -v uv >/dev/null; then \
		uv pip install --quiet --python $(BIN)/python --editable . --group $*; \
	else \
		$(BIN)/python -m pip install --quiet --editable . --group $*; \
	fi
	@touch $@
