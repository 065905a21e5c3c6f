VENV ?= .venv
PYTHON = $(VENV)/bin/python

.PHONY: smoke quickstart test test-oldest faults lint

# Three updates with the real weights, from loading to the answers: does it work here?
smoke: $(VENV)/quickstart.installed
	$(PYTHON) train.py --preset quickstart --max-steps 3

quickstart: $(VENV)/quickstart.installed
	$(PYTHON) train.py --preset quickstart --epochs 2 --lr 2e-4

# Each process takes one half of the tests in their order, as the runs that a file's tests share are made once by each
# process that takes some of them; the one that has finished takes over half of what the other has left.
test: $(VENV)/dev.installed
	$(PYTHON) -m pytest -n 2 --dist worksteal

# What may happen to a run, all of it, and every other slow test wherever it is.
faults: $(VENV)/dev.installed
	$(PYTHON) -m pytest tests/faults -m "slow or not slow"
	$(PYTHON) -m pytest --ignore tests/faults -m slow

lint: $(VENV)/dev.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The oldest supported libraries, in an environment of their own: of each package the first line counts.
test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest -n 2 --dist worksteal

.venv-oldest/installed: requirements-oldest.txt requirements.txt requirements-dev.txt requirements-quickstart.txt
	python3 -m venv .venv-oldest
	awk -F'[=<]' '/^[a-z]/ && !seen[$$1]++' requirements-oldest.txt requirements.txt requirements-dev.txt \
		> .venv-oldest/requirements.txt
	.venv-oldest/bin/python -m pip install --quiet -r .venv-oldest/requirements.txt -c requirements-quickstart.txt
	.venv-oldest/bin/python -m pip install --quiet --no-deps -r requirements-quickstart.txt
	touch $@

$(VENV)/quickstart.installed: requirements.txt requirements-quickstart.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet -r requirements.txt
	$(PYTHON) -m pip install --quiet --no-deps -r requirements-quickstart.txt
	touch $@

$(VENV)/dev.installed: $(VENV)/quickstart.installed requirements-dev.txt
	$(PYTHON) -m pip install --quiet -r requirements-dev.txt
	touch $@
