VENV ?= .venv
PYTHON = $(VENV)/bin/python

.PHONY: quickstart test test-oldest faults lint

quickstart: $(VENV)/quickstart.installed
	$(PYTHON) train.py --preset quickstart --epochs 2 --lr 2e-4

test: $(VENV)/dev.installed
	$(PYTHON) -m pytest -n 2 --dist loadfile

# The oldest supported torch and transformers, in an environment of their own; torch comes with CUDA's libraries, 5 GB.
test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest -n 2 --dist loadfile

.venv-oldest/installed: requirements-oldest.txt requirements-quickstart.txt
	python3 -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet -r requirements-oldest.txt
	.venv-oldest/bin/python -m pip install --quiet --no-deps -r requirements-quickstart.txt
	touch $@

faults: $(VENV)/dev.installed
	$(PYTHON) -m pytest tests/faults tests/test_processes.py tests/test_push.py -m "slow or not slow"

lint: $(VENV)/dev.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/quickstart.installed: requirements.txt requirements-quickstart.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet -r requirements.txt
	$(PYTHON) -m pip install --quiet --no-deps -r requirements-quickstart.txt
	touch $@

$(VENV)/dev.installed: $(VENV)/quickstart.installed requirements-dev.txt
	$(PYTHON) -m pip install --quiet -r requirements-dev.txt
	touch $@
