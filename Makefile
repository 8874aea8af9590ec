# `make test` and `make demo` need Python 3.11 or newer and make, nothing else: both build `.venv`
# from pyproject.toml and constraints.txt first, and again whenever one of the two changes.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
EXTRAS ?= all,dev
comma  := ,
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

.PHONY: test demo lint venv clean

test: lint
	$(BIN)/python -m pytest -n 2

demo: $(STAMP)
	$(BIN)/keras-kd demo --overwrite

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

venv: $(STAMP)

# The stamp is written last, so an interrupted installation is taken up again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name it with: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

clean:
	rm -rf $(VENV) build dist runs
