# Needs only Python 3.11 or later. Two commands do everything:
#
#   make quickstart    set up, then run the main job into quickstart/
#   make test          set up, then pass the tests
#
# The set-up is a virtual environment with the tested versions of constraints.txt, torch first. On Linux a plain
# `pip install torch` is the CUDA build, several GB. Where a CPU is all there is, take PyTorch's own CPU build:
#
#   make quickstart TORCH_INDEX=https://download.pytorch.org/whl/cpu
#
# (https://pytorch.org/get-started/locally names the index of every CUDA and ROCm build.) TORCH_INDEX counts when torch
# is installed, so remove .venv to change builds.
#
# Without make, the same by hand:
#
#   python3 -m venv .venv
#   .venv/bin/pip install -c constraints.txt torch
#   .venv/bin/pip install -c constraints.txt -e .
#   .venv/bin/medkd quickstart --out quickstart
#
# where the second line for the CPU build is
#
#   .venv/bin/pip install -c constraints.txt --no-deps --index-url https://download.pytorch.org/whl/cpu torch
#
# and for the tests, the last two are
#
#   .venv/bin/pip install -c constraints.txt -e '.[dev]'
#   .venv/bin/python -m pytest

PYTHON ?= python3
VENV ?= .venv
OUT ?= quickstart
TORCH_INDEX ?=
WORKERS ?= 2

.DELETE_ON_ERROR:
.PHONY: quickstart test check check-lint check-format check-types check-spelling clean

quickstart: $(VENV)/medkd-installed
	$(VENV)/bin/medkd quickstart --out $(OUT)

# One thread for each of the workers: the tests' arrays are small, and threads would only compete.
test: $(VENV)/medkd-dev-installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS)

# Apart, so that `make -k check` goes on to the others when one finds something.
check: check-lint check-format check-types check-spelling
check-lint check-format check-types check-spelling: $(VENV)/medkd-dev-installed
check-lint:
	$(VENV)/bin/ruff check .
check-format:
	$(VENV)/bin/ruff format --check .
check-types:
	$(VENV)/bin/mypy
check-spelling:
	$(VENV)/bin/codespell

clean:
	rm -rf $(VENV)

# --no-deps: what torch needs comes with the next step, in the tested versions, which PyTorch's index may not hold.
$(VENV)/torch-installed: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "error: $(PYTHON): medkd needs Python 3.11 or later; install one and name it, as in make PYTHON=python3.12" >&2; \
		exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -c constraints.txt $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX)) torch
	@touch $@

$(VENV)/medkd-installed: $(VENV)/torch-installed pyproject.toml
	$(VENV)/bin/pip install -c constraints.txt -e .
	@touch $@

$(VENV)/medkd-dev-installed: $(VENV)/torch-installed pyproject.toml
	$(VENV)/bin/pip install -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/medkd-installed
