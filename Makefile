# make        set up .venv and build rpe_ops into it
# make test   all tests
# make faults kill runs that then go on, and damage files: benchmarks/faults.txt is what it printed
# make demo   train and evaluate a small DeiT on real digits      make demo-detr   a small DETR on pictures of them
PYTHON ?= python3
VENV   ?= .venv
PY     := $(abspath $(VENV))/bin/python

.PHONY: build test faults demo demo-detr clean
.DELETE_ON_ERROR:

build: $(VENV)/rpe_ops.done

$(VENV)/packages.done: requirements.txt requirements-dev.txt requirements-export.txt requirements-submitit.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -r requirements.txt -r requirements-dev.txt
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

clean:
	rm -rf $(VENV) outputs rpe_ops/build rpe_ops/*.egg-info
