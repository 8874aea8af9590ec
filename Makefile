# `make test` and `make demo` need Python 3.11 or newer and make, nothing else: each builds `.venv`
# from pyproject.toml and constraints.txt first, and again whenever one of the two changes.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
EXTRAS ?= all,dev,jax,torch

VENV := .venv
BIN  := $(VENV)/bin

.NOTPARALLEL:
.PHONY: test demo faults lint notebooks exported docs mediapipe runtimes venv clean

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

demo: $(VENV)/.demo
	$(BIN)/keras-kd demo --overwrite

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A hundred bad inputs and fifty kills at random points; SEED=... tries others.
faults: $(VENV)/.test
	KERAS_BACKEND=tensorflow TF_CPP_MIN_LOG_LEVEL=3 \
		$(BIN)/python tests/faults/run.py --seed $(or $(SEED),13)

# The committed notebooks, with outputs, from examples/*.py.
notebooks: $(VENV)/.test
	$(BIN)/python examples/_notebooks.py

# The committed files of exported/, from a new run of the demo.
exported: demo
	$(BIN)/keras-kd export runs/digits/student.keras --name digits --precisions int8 \
		--labels 0,1,2,3,4,5,6,7,8,9 --mean 0 --std 255 --calibration digits --evaluation digits \
		--out exported/digits --overwrite
	rm exported/digits/report.html

docs: pyproject.toml
	$(call install,docs)
	$(BIN)/mkdocs build --strict

# MediaPipe's classifier on exported files, in an environment of its own.
mediapipe: $(VENV)/.test .venv-mediapipe/.done
	$(BIN)/python -m pytest tests/export/test_mediapipe.py

.venv-mediapipe/.done:
	$(PYTHON) -m venv .venv-mediapipe
	.venv-mediapipe/bin/python -m pip install --quiet mediapipe==1.2.2
	@touch $@

# Small students in the runtimes of devices, each in an environment of its own, beside what the
# report says of them. Results and the printed matrix are in runs/runtimes.
ENVIRONMENTS := $(basename $(notdir $(wildcard tests/runtimes/environments/*.txt))) node

runtimes: $(VENV)/.test $(ENVIRONMENTS:%=.venv-runtimes/%/.done)
	$(BIN)/python tests/runtimes/run.py runs/runtimes

.venv-runtimes/%/.done: tests/runtimes/environments/%.txt
	$(PYTHON) -m venv .venv-runtimes/$*
	.venv-runtimes/$*/bin/python -m pip install --quiet --requirement $<
	@touch $@

# pnnx asks for PyTorch, which its converter of ONNX files does not use.
.venv-runtimes/ncnn/.done: tests/runtimes/environments/ncnn.txt
	$(PYTHON) -m venv .venv-runtimes/ncnn
	.venv-runtimes/ncnn/bin/python -m pip install --quiet --no-deps --requirement $<
	@touch $@

.venv-runtimes/node/.done: tests/runtimes/environments/node/package.json
	mkdir -p .venv-runtimes/node
	cp $< .venv-runtimes/node/package.json
	npm install --prefix .venv-runtimes/node --ignore-scripts --no-audit --no-fund
	@touch $@

venv: $(VENV)/.test

# A stamp is written last, so an interrupted installation is taken up again.
define install
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
$(PYTHON) -m venv $(VENV)
$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(1)]'
endef

$(VENV)/.demo: pyproject.toml constraints.txt
	$(call install,all)
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt
	$(call install,$(EXTRAS))
	@touch $@

clean:
	rm -rf $(VENV) build dist site runs
