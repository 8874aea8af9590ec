# `make test` and `make demo` need Python 3.11 or newer and make, nothing else: each builds `.venv`
# from pyproject.toml and constraints.txt first, and again whenever one of the two changes.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
EXTRAS ?= all,dev,jax,torch

VENV := .venv
BIN  := $(VENV)/bin

.NOTPARALLEL:
.PHONY: test demo faults lint types examples notebooks exported docs package newest mediapipe federated runtimes venv clean

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

demo: $(VENV)/.demo
	$(BIN)/keras-kd demo --overwrite

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# pyright on the user's programs that mypy reads too, with a Node.js from the package index.
types: $(VENV)/.test .venv-types/.done
	.venv-types/bin/pyright --pythonpath $(BIN)/python

.venv-types/.done:
	$(PYTHON) -m venv .venv-types
	.venv-types/bin/python -m pip install --quiet 'pyright[nodejs]==1.1.414'
	@touch $@

# A hundred bad inputs and fifty kills at random points; SEED=... tries others.
faults: $(VENV)/.test
	KERAS_BACKEND=tensorflow TF_CPP_MIN_LOG_LEVEL=3 \
		$(BIN)/python tests/faults/run.py --seed $(or $(SEED),13)

# Every example on the small data that come along, each from a fresh kernel.
examples: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m notebooks tests/examples

# The committed notebooks, with outputs, from examples/*.py.
notebooks: $(VENV)/.test
	$(BIN)/python examples/_notebooks.py

# The committed files of exported/, from a new run of the demo.
exported: demo
	$(BIN)/keras-kd export runs/digits/student.keras --name digits --precisions int8 \
		--labels 0,1,2,3,4,5,6,7,8,9 --mean 0 --std 255 --calibration digits --evaluation digits \
		--out exported/digits --overwrite
	rm exported/digits/report.html

# The site, warnings being errors, in `site`.
docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

# Wheel and sdist in `dist`, and every extra installed alone and used. EXTRA=report tries one.
package: .venv-package/.done
	.venv-package/bin/python tests/package/run.py $(EXTRA) --keep dist

.venv-package/.done:
	$(PYTHON) -m venv .venv-package
	.venv-package/bin/python -m pip install --quiet build==1.6.1
	@touch $@

# The newest versions that pip takes without constraints.txt, and the tests of what depends on them.
NEWEST_TESTS ?= tests/backends tests/export tests/compress tests/typing

newest:
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade --editable '.[$(EXTRAS)]'
	.venv-newest/bin/python -m pip list
	.venv-newest/bin/python -m pytest -n 2 $(NEWEST_TESTS)

# MediaPipe's classifier on exported files, in an environment of its own.
mediapipe: $(VENV)/.test .venv-mediapipe/.done
	$(BIN)/python -m pytest tests/export/test_mediapipe.py

.venv-mediapipe/.done:
	$(PYTHON) -m venv .venv-mediapipe
	.venv-mediapipe/bin/python -m pip install --quiet mediapipe==1.2.2
	@touch $@

# Federations over Flower, in its simulation and as processes, in an environment of their own.
federated: .venv-federated/.done
	FLWR_TELEMETRY_ENABLED=0 RAY_USAGE_STATS_ENABLED=0 TF_CPP_MIN_LOG_LEVEL=3 \
		.venv-federated/bin/python -m pytest tests/federated

.venv-federated/.done: pyproject.toml constraints-federated.txt
	$(PYTHON) -m venv .venv-federated
	.venv-federated/bin/python -m pip install --quiet --constraint constraints-federated.txt \
		--editable '.[export,federated,jax]' pytest pytest-timeout
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

$(VENV)/.docs: pyproject.toml constraints.txt
	$(call install,docs)
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt
	$(call install,$(EXTRAS))
	@touch $@

clean:
	rm -rf $(VENV) .venv-newest .venv-package .venv-types build dist site runs
