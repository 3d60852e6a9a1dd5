# make lab    run the studies and build the site       make test   run all tests
# make lint   ruff, mypy, import-linter                make bench  ours against the peers
# make docs   the documentation                        make web    formula engines for the browser tests
# Each target makes what it needs: the environment is .venv, reused while it is up to date.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
BUDGET ?= quick

.PHONY: lab test lint bench docs web format readme clean
.DELETE_ON_ERROR:

lab: $(VENV)/core.stamp
	@$(BIN)/kexue run all --budget $(BUDGET) --jobs $(JOBS) --site site

test: $(VENV)/test.stamp web
	KEXUE_CHECK_SHAPES=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/bench.stamp web
	$(BIN)/python -m benchmarks $(METHODS)

docs: $(VENV)/docs.stamp
	$(BIN)/python -m kexue.lab.readme
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html
	@echo docs/_build/html/index.html

readme: $(VENV)/core.stamp
	$(BIN)/python -m kexue.lab.readme

format: $(VENV)/test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Without npm the tests that need the formula engines are skipped, and their study says "not run".
web:
	@if [ node_modules/.stamp -nt package.json ]; then :; \
	elif command -v npm >/dev/null 2>&1; then npm install --no-package-lock --no-audit --no-fund --loglevel=error && touch node_modules/.stamp; \
	else echo "npm is absent: the browser tests will be skipped"; fi

clean:
	rm -rf $(VENV) runs site docs/_build node_modules build dist

# core: to run the studies (and a browser for the one about web pages); the others add to it.
$(VENV)/core.stamp: EXTRAS := browser,images
$(VENV)/test.stamp: EXTRAS := test,lint
$(VENV)/bench.stamp: EXTRAS := test,bench
$(VENV)/docs.stamp: EXTRAS := test,docs

$(VENV)/%.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
