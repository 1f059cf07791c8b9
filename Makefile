# One environment in .venv, built from pyproject.toml under constraints.txt.
PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --constraint constraints.txt

.PHONY: help demo seeds test test-all lint bench docs wheel release-check clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# torch first and under the constraint: a later resolver then finds it installed and fetches no other build.
.venv/demo: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable .
	touch $@

.venv/test: .venv/demo
	$(PIP) --editable '.[deepspeed,eval,export,hygiene,serve,trackers,docs,dev]'
	touch $@

demo: .venv/demo  ## the whole chain in miniature: minutes on 2 cores, ends in a table
	.venv/bin/smolpost run pipeline=tiny

seeds: .venv/demo  ## the miniature with three seeds: the table and plot of docs/miniature.md
	for seed in 0 1 2; do .venv/bin/smolpost run pipeline=tiny seed=$$seed run_dir=runs/seed-$$seed || exit 1; done
	.venv/bin/smolpost compare runs/seed-0/tiny runs/seed-1/tiny runs/seed-2/tiny --plot docs/miniature.png

test: .venv/test  ## the test suite without its slow part
	$(PY) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m 'not slow'

test-all: .venv/test  ## the whole test suite
	$(PY) -m pytest

lint: .venv/test  ## ruff, check and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: .venv/test  ## every benchmark beside its peer, results in benchmarks/results
	for name in plan prepare packing sft row_length apo head checkpoint generation merge teacher_client teacher_run; do $(PY) benchmarks/$$name.py || exit 1; done

docs: .venv/test  ## the documentation site in site/; `python -m http.server -d site` shows it
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

wheel: .venv/test  ## build a wheel into dist/
	rm -rf build dist
	$(PY) -m build --wheel --no-isolation

release-check: .venv/test  ## build sdist and wheel, and install the wheel in an empty environment: 10 minutes
	rm -rf build dist
	$(PY) -m build --no-isolation
	SMOLPOST_DIST=dist $(PY) -m pytest tests/test_wheel.py

clean:  ## remove the environment and what was built
	rm -rf .venv build dist site *.egg-info
