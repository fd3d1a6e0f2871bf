# make            create .venv and build rpe_ops into it
# make test       run the linter and all tests
# make demo       train and evaluate a small DeiT on real digits
# make demo-detr  train and evaluate a small DETR on images of the same digits
# make faults     kill and resume runs, and damage files; benchmarks/faults.txt shows what it printed
# make vendor     copy the files that both codebases share from DeiT-with-iRPE to DETR-with-iRPE
# make format     format all Python files
PYTHON ?= python3
VENV   ?= .venv
PY     := $(abspath $(VENV))/bin/python

.PHONY: build test faults demo demo-detr vendor format clean
.DELETE_ON_ERROR:

build: $(VENV)/rpe_ops.done

$(VENV)/packages.done: pyproject.toml requirements-dev.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -r requirements-dev.txt
	touch $@

$(VENV)/rpe_ops.done: $(VENV)/packages.done $(shell git ls-files rpe_ops 2>/dev/null)
	$(PY) -m pip install --quiet --no-build-isolation --no-deps --force-reinstall ./rpe_ops
	touch $@

test: build
	$(PY) .ci/test.py

faults: build
	OMP_NUM_THREADS=1 $(PY) tests/faults.py

demo: build
	cd DeiT-with-iRPE && $(PY) demo.py --output_dir ../outputs/demo

demo-detr: build
	cd DETR-with-iRPE && $(PY) demo/run.py --output_dir ../outputs/demo-detr

vendor:
	$(PYTHON) .ci/vendor.py

format: build
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

clean:
	rm -rf $(VENV) outputs build *.egg-info rpe_ops/build rpe_ops/*.egg-info
