# `make demo` and `make test` do their own set-up, in .venv; see README.md.

PYTHON ?= python3
PIP_FLAGS ?=
PYTEST_FLAGS ?= -q -n auto --dist loadfile
BENCH_FLAGS ?=
GPU_REPORT_FLAGS ?=
DEMO_RUN := runs/demo
DEMO_TRAINING := --preset tiny train.time_budget=290

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt
SET_UP := $(VENV)/.set-up
PROSE := --include=*.py --include=*.md --include=*.h --include=*.cpp --include=*.cu --include=*.cuh \
    csrc route_kernels route_detr benchmarks tests examples docs README.md CONTRIBUTING.md CHANGELOG.md setup.py
KERNEL_SOURCES := $(shell find csrc -type f)

.PHONY: demo test bench gpu-report lint clean
.NOTPARALLEL:

demo: $(SET_UP)
	@if [ -e $(DEMO_RUN)/last.pt ]; then \
	    echo "== going on with $(DEMO_RUN) (to start again: rm -r $(DEMO_RUN))"; \
	    $(BIN)/route-detr train --out $(DEMO_RUN) --resume; \
	else $(BIN)/route-detr train --out $(DEMO_RUN) $(DEMO_TRAINING); fi
	@$(BIN)/python -m benchmarks train-step --run $(DEMO_RUN)

test: $(SET_UP)
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

bench: $(SET_UP)
	@$(BIN)/python -c 'import torch_ms_deform_attn' 2>/dev/null || { \
	    echo "== installing the packages to compare with (benchmarks/requirements.txt)"; \
	    $(PIP_INSTALL) --quiet --no-build-isolation -r benchmarks/requirements.txt || \
	    echo "== they could not be installed: their rows will say so"; }
	$(BIN)/python -m benchmarks ops $(BENCH_FLAGS)
	$(BIN)/python -m benchmarks train-step
	$(if $(filter --quick,$(BENCH_FLAGS)),,$(BIN)/python -m benchmarks memory-levels)
	$(BIN)/python -m benchmarks drop-ins $(filter --quick,$(BENCH_FLAGS))

# With the PyTorch, Triton and Python that are there: a machine lent for ten minutes has no time for a set-up.
gpu-report:
	@$(PYTHON) -c 'import torch' 2>/dev/null || { \
	    echo "gpu-report: no PyTorch in '$(PYTHON)'; try make gpu-report PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) -m benchmarks gpu-report $(GPU_REPORT_FLAGS)

lint: $(SET_UP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tests benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror
	@! grep -rnE '(^ *|- |[.:?] |"""|// |(^|[^#])# )(Of|As|What) ' $(PROSE) || { \
	    echo "lint: a sentence begins with a verb or a noun, not with Of, As or What" >&2; exit 1; }

# Everything installed, kernels built; done again when a version, the build or a kernel source changed.
$(SET_UP): constraints.txt pyproject.toml setup.py $(KERNEL_SOURCES)
	@command -v $(PYTHON) >/dev/null || { \
	    echo "route-kernels needs Python 3.10 or newer: no '$(PYTHON)' here; try make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "route-kernels needs Python 3.10 or newer: '$(PYTHON)' is $$($(PYTHON) -V 2>&1); try make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "route-kernels needs Python's venv module: '$(PYTHON)' has none; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "== installing PyTorch and the build tools in $(VENV)"
	@$(PIP_INSTALL) torch setuptools wheel ninja
	@echo "== installing what else is needed, building the kernels (about a minute each)"
	@$(PIP_INSTALL) --quiet --no-build-isolation -e '.[dev]'
	@$(BIN)/route-kernels info
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info route_kernels/*.so .pytest_cache .ruff_cache .hypothesis
