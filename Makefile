# Everything starts from python3 and pip: the first call makes .venv, later calls reuse it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONPATH := $(CURDIR)
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-all browser check docs lab clean

demo: $(STAMP)  ## GRPO post-training of the tiny camera model, with its HTML report
	$(BIN)/camflow run recam_grpo -f demo

test: $(STAMP)  ## everything that must hold before a commit lands
	$(BIN)/python -m tools.checks exported clean
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.nbtest --n-workers 2
	$(PYTEST) worksteal -m "not slow"

test-all: test browser  ## also the long faults and browser tests; what is skipped prints its reason
	$(PYTEST) loadfile -m slow

browser:  ## what the browser tests need beside node and Debian's chromium; without npm they are skipped and say so
	@if command -v npm > /dev/null; then cd tests/browser && { PLAYWRIGHT_SKIP_BROWSER_DOWNLOAD=1 npm ci --no-audit --no-fund || echo "browser: npm ci failed, the browser tests are skipped"; }; else echo "browser: npm is not installed, the browser tests are skipped"; fi

check: $(STAMP)  ## before a commit: export, clean, lint
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	$(BIN)/python -m tools.checks readme --write
	$(BIN)/python -m camflow.lab.gallery
	$(BIN)/ruff check .

docs: $(STAMP)  ## the site in _docs, from notebooks, docs/ and the gallery; DOCS=--execute runs the notebooks first
	OMP_NUM_THREADS=1 $(BIN)/python -m camflow.lab.docs --out _docs $(DOCS)

lab: $(STAMP)  ## JupyterLab on the notebooks
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) nbs

$(STAMP): settings.ini setup.py constraints.txt
	@echo "building .venv: about 2.7 GB, some minutes of downloads"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "$$(grep ^torch== constraints.txt)"
	$(BIN)/pip install -q -c constraints.txt -e ".[dev,docs]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
