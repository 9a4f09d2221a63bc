# make demo: install, train a small Segmenter with and without merging, show a table and pictures
# make test: install, run the test suite on all cores (minutes); make quick: its fast tests alone
# make soak: what takes long, and what the test suite has a representative of (an hour)
# make docs: the documentation site, in build/site
# make release: wheel and source archive of the last commit, in dist/, checked; prints how to publish them
# make real DATASET=… WEIGHTS=…: train DINOv2 ViT-S/14 on CamVid and measure what merging costs and gains (hours)
PYTHON ?= python3
BIN := .venv/bin

# One process per core, at most four: each takes about 1 GB. A process that has nothing left takes over tests.
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal

.PHONY: demo real test quick soak lint docs release system clean

demo: .venv/installed
	$(BIN)/python scripts/demo.py

real: .venv/installed
	DATASET=$(DATASET) $(BIN)/python scripts/real_results.py $(if $(WEIGHTS),--weights $(WEIGHTS))

test: .venv/installed
	$(PYTEST) -m "not nightly"

quick: .venv/installed
	$(PYTEST) -m "not slow and not nightly"

soak: .venv/installed
	$(PYTEST) -m nightly

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml | system
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# opencv-python needs two libraries that slim images lack.
system:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is too old: install Python 3.11 or newer, or give make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ctypes; [ctypes.CDLL(name) for name in ("libGL.so.1", "libglib-2.0.so.0")]' 2>/dev/null \
		|| { echo "OpenCV needs libGL and libglib: apt-get install libgl1 libglib2.0-0"; exit 1; }

# The documentation site, in build/site; its pictures need the demo's model, which is trained first (minutes).
docs: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	test -f runs/demo/pure/checkpoint.pth || $(BIN)/python scripts/demo.py
	$(BIN)/python scripts/build_docs.py --run runs/demo/pure

release: .venv/installed
	$(BIN)/python -m pip install --quiet 'setuptools>=77' twine
	$(BIN)/python scripts/release.py --out dist
	$(BIN)/python -m twine check --strict dist/*

clean:
	rm -rf .venv build dist *.egg-info
