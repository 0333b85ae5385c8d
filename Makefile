# make setup            a virtual environment in .venv with everything that tests and lint need
# make demo|test|lint|bench    in .venv if it is there, else with python3; PYTHON=... names another

VENV := .venv
BASE_PYTHON ?= python3
# Evaluated at each use: `make setup test` must see the environment that setup made.
PYTHON ?= $(shell test -x $(VENV)/bin/python && echo $(VENV)/bin/python || echo $(BASE_PYTHON))

.PHONY: setup demo test lint bench bench-models codegen-matrix model ada-on-hopper ncu

# A torch that is already importable is kept (a GPU machine has the build that its driver needs), and
# the environment sees it. Without one, CI's pinned versions are installed, torch first: alone, its
# version pin finds a local CPU build, and all that follows finds torch satisfied.
setup:
	@set -e; \
	if $(BASE_PYTHON) -c 'import torch' 2>/dev/null; then \
	    $(BASE_PYTHON) -m venv --system-site-packages $(VENV); \
	    $(VENV)/bin/python -m pip install -e '.[test,dev]'; \
	else \
	    $(BASE_PYTHON) -m venv $(VENV); \
	    $(VENV)/bin/python -m pip install -c constraints-ci.txt torch; \
	    $(VENV)/bin/python -m pip install -c constraints-ci.txt -e '.[test,dev]'; \
	fi

demo:
	$(PYTHON) -m fastmm_op demo

# Triton decides at import whether kernels are interpreted or compiled, so this takes two processes:
# the kernels on CPU tensors; then ATen's CPU path, code generation, and the GPU where there is one.
# Each runs on all cores, a thread a worker.
test:
	@status=0; export OMP_NUM_THREADS=1; for interpret in 1 0; do \
	    echo "TRITON_INTERPRET=$$interpret $(PYTHON) -m pytest -n auto --dist worksteal tests/"; \
	    TRITON_INTERPRET=$$interpret $(PYTHON) -m pytest -n auto --dist worksteal tests/ || status=$$?; \
	done; exit $$status

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

# What Triton 3.6 to 3.9 make of the 4090's plan of the seed workload; no GPU, some minutes.
codegen-matrix:
	$(PYTHON) benchmarks/codegen_matrix.py --arch sm_89

# The RTX 4090's times, predicted from what the plans compile to; no GPU, some minutes.
model:
	$(PYTHON) benchmarks/model_4090.py

# The 4090's kernels tested and timed on a Hopper card, beside the model.
ada-on-hopper:
	$(PYTHON) benchmarks/ada_on_hopper.py --out benchmarks/results/ada_on_hopper

# Nsight Compute's counters of the seed-style kernel and of ours.
ncu:
	$(PYTHON) benchmarks/ncu_report.py

# Whole models; needs transformers and timm for two of them.
bench-models:
	$(PYTHON) benchmarks/bench_models.py
	$(PYTHON) benchmarks/report_models.py

bench:
	$(PYTHON) benchmarks/bench_matmul.py
	$(PYTHON) benchmarks/bench_matmul.py --precision fp32 --filter fp32-fp32
	$(PYTHON) benchmarks/report.py
