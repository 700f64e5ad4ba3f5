# What a developer types; `make` lists it. PYTHON is that of an environment with requirements-dev.txt installed.
PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)
PYTEST = -m pytest -n auto --dist loadfile
WALLS = $(PYTHON) -c "from importlinter.cli import lint_imports_command as main; main()" --no-cache --no-logo

.DEFAULT_GOAL := help
.PHONY: help check test full nightly faults mutants shots bench rooms api matrix

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-9s%s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

check: ## lint, format, types, and the walls between the rooms of core/
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(WALLS)
	$(PYTHON) -m pytest -q tests/architecture/test_rooms.py

test: ## the tests of tier ci, which need no extras
	$(PYTHON) $(PYTEST) --durations=15

full: .venv-full ## the tests of tiers ci and full, with extras and other programs, in .venv-full; at most 60 minutes
	$</bin/python $(PYTEST) --tier full

nightly: .venv-full ## the exhaustive crash model, long fuzzing, all tests, a CUDA wheel; hours (MINUTES=60 for each part)
	bash .ci/nightly

faults: ## kill, fill the disk, cut the power, flip bits; counts of what was lost (PARTS='killed_runs damage')
	$(PYTHON) -m tests.faults $(PARTS)

mutants: ## break 150 lines, one at a time, and print how many of the breaks a test finds (COUNT=20 SEED=1); hours
	$(PYTHON) -m tests.mutants --count $(or $(COUNT),150) --seed $(or $(SEED),0) --jobs 2

shots: ## take the picture of the page in README.md again, of MODEL=checkpoints/dante; needs chromium and playwright
	$(PYTHON) -m tests.shots $(or $(MODEL),checkpoints/dante)

api: ## write docs/api.md from the docstrings
	$(PYTHON) -m tests.api

matrix: ## run tests on each Python and torch that is supported, into docs/versions.md (FLAGS='--python python3.12')
	$(PYTHON) -m tests.matrix $(FLAGS)

bench: ## measure every claim of docs/benchmarks.md, into its table; hours (FLAGS='save convert', FLAGS=--quick)
	$(PYTHON) -m benchmarks $(FLAGS)

rooms: ## the walls between the rooms of core/ alone
	$(WALLS)
	$(PYTHON) -m pytest -q tests/architecture/test_rooms.py

.venv-full: requirements.txt requirements-dev.txt requirements-full.txt
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet -r requirements-full.txt
	touch $@
