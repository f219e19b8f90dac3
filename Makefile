# `make demo` and `make test` need Python 3.11+ and make, and do the rest in .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint bench docs versions release clean

demo: .venv/.demo
	$(BIN)/bigbatch demo

test: .venv/.test
	$(BIN)/python tests/run.py

lint: .venv/.test
	$(BIN)/python tests/run.py lint

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo 'open site/index.html'

bench: .venv/.test
	$(BIN)/python benchmarks/run.py

versions: .venv/bin/python
	$(BIN)/python tests/versions.py

release: .venv/.release
	$(BIN)/python tests/release.py

clean:
	rm -rf .venv .versions site dist

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "bigbatch needs Python 3.11 or newer. Received: $(PYTHON) = %d.%d. Run make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv

.venv/.demo: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) --editable '.[torch,demo]'
	touch $@

.venv/.test: .venv/.demo
	$(INSTALL) --editable '.[torch,jax,keras,tensorflow-cpu,demo,docs,release,dev]'
	$(INSTALL) --no-deps open_clip_torch # its losses; torchvision's wheel fails beside a PyTorch for a CPU
	touch $@

.venv/.docs: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) --editable '.[docs]'
	touch $@

.venv/.release: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) --editable '.[release]'
	touch $@
