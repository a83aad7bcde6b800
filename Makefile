# Two commands do everything, set-up included: `make demo` and `make test`. See README.md.
PYTHON ?= python3
PY := .venv/bin/python
VIDEOS ?=
PRESET ?= demo
SOAK ?= 50
KILLS ?= 200
WORLDS ?= 500
# One maths thread a process: the numbers of a chapter then do not depend on how many run beside it.
ONE := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_OFFLINE := 1

.PHONY: demo test soak lab bench book outputs
.DEFAULT_GOAL := help
help:
	@echo "make demo     prepare -> Phase A -> gate -> Phase B -> evaluate, on the sample clips; VIDEOS=folder for your own"
	@echo "make test     every check: drift, chapters, laws, tests"
	@echo "make soak     long counts: kills and corrupted inputs (SOAK=50), the crash laboratory (KILLS=200), pods among faults (WORLDS=500)"
	@echo "make lab      the workbook in JupyterLab"
	@echo "make book     the book as web pages, _build/html/index.html; LINKS=1 asks the addresses outside too"
	@echo "make bench    what things cost, as figures and ratios of one run"
	@echo "make outputs  run every chapter again and keep its outputs"

# The stamp is written last: an install that was interrupted is taken up again.
.venv/ready: pyproject.toml constraints.txt constraints-torch.txt
	@$(PYTHON) -c 'import sys; sys.version_info>=(3,11) or sys.exit("Python 3.11 or newer is needed, this is "+sys.version.split()[0]+": make PYTHON=python3.11 ...")'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install -q -c constraints.txt -c constraints-torch.txt -e '.[dev]'
	@touch $@

demo: .venv/ready
	$(PY) -m deepfake_nb.plan demo --preset $(PRESET) $(if $(VIDEOS),--videos '$(VIDEOS)')

test: .venv/ready
	$(ONE) $(PY) tools/check.py

soak: .venv/ready
	$(ONE) SOAK=$(SOAK) $(PY) -m pytest -s tests/test_store.py tests/test_checkpoints.py tests/test_training.py tests/test_video.py tests/test_forge.py tests/test_compile.py tests/test_chunks.py tests/test_datasets.py tests/test_budget.py tests/test_progress.py tests/test_plan.py tests/test_metrics.py tests/test_calibration.py tests/test_fusion.py tests/test_compare.py tests/test_export.py tests/test_detect.py tests/test_page.py tests/test_monitor.py
	$(ONE) SOAK=$(KILLS) $(PY) -m pytest -s tests/test_crashes.py
	$(ONE) SOAK=$(WORLDS) $(PY) -m pytest -s tests/test_pod.py

lab: .venv/ready
	$(PY) -m jupyter lab --notebook-dir=nbs

# The book has an environment of its own: its pins and the project's do not agree.
.venv-book/ready: book/requirements.txt
	test -x .venv-book/bin/python || $(PYTHON) -m venv .venv-book
	.venv-book/bin/python -m pip install -q -r book/requirements.txt
	@touch $@

book: .venv-book/ready
	.venv-book/bin/python tools/book.py $(if $(LINKS),--links)

bench: .venv/ready
	@for f in benchmarks/*.py; do echo "== $$f"; $(ONE) $(PY) $$f || exit 1; done

outputs: .venv/ready
	$(PY) -c 'from nbdev.doclinks import nbdev_export; nbdev_export()'
	$(ONE) $(PY) tools/check.py --save
	$(PY) tools/readme.py
