# A machine needs Python >= 3.11 and make. Everything else goes into .venv.
#   make leaderboard   set up, and print the leaderboard on the embedded data
#   make test          set up, and run the tests (MARKS= runs the slow ones too)

PYTHON ?= python3
VENV ?= .venv
MARKS ?= not slow
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: leaderboard test lint types clean

leaderboard: $(VENV)/installed
	$(BIN)/rbl leaderboard

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n logical --dist worksteal -m "$(MARKS)"

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	$(BIN)/mypy

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
