# make table1   Table 1 on the built-in demo, from nothing: environment, installation, build, run
# make test     the same set-up, then the tests
# make bench    the same set-up, then the benchmarks; ARGS="-k gradient" for a part
#
# An active virtual environment (or conda environment) is used as it is; otherwise .venv is made here. A torch that is
# already there, of any kind, is kept. Variables:
#   PYTHON=python3.12       which Python makes .venv (3.11 or later)
#   TORCH_INDEX=URL         package index that torch comes from, if it must be installed (e.g. that of its CPU-only builds)
#   ARGS="--dataset idc --data-root DIR"                more options for table1 (or for pytest: make test ARGS="-k stain")
#   TORCH_CUDA_ARCH_LIST, HISTODD_CUDA, HISTODD_EXTENSION   what is compiled, see setup.py; with a CUDA toolkit and a CUDA
#                           torch the GPU's architecture, or 9.0 alone where no GPU is visible, to keep the build short

SHELL := /bin/bash
CONDA := $(if $(filter-out base,$(CONDA_DEFAULT_ENV)),$(CONDA_PREFIX))
VENV := $(or $(VIRTUAL_ENV),$(CONDA),$(CURDIR)/.venv)
PY := $(VENV)/bin/python
# Stamps live in the environment, one set per checkout, so that a second call is quick and a new environment starts over.
STAMPS := $(VENV)/.histodd-bench/$(shell echo '$(CURDIR)' | cksum | cut -d' ' -f1)
# An upgraded torch needs a rebuild: pip writes RECORD when it installs.
TORCH := $(wildcard $(VENV)/lib/python3*/site-packages/torch-*.dist-info/RECORD)
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)
ARGS ?=

.PHONY: table1 test bench lint build clean
.DELETE_ON_ERROR:

table1: $(STAMPS)/installed
	$(PY) -m histodd_bench run table1 $(ARGS)

test: $(STAMPS)/dev
	$(PY) -m pytest $(ARGS)

bench: $(STAMPS)/bench
	$(PY) -m pytest $(sort $(wildcard benchmarks/bench_*.py)) --benchmark-columns=median,min,max,rounds $(ARGS)

lint: $(STAMPS)/dev
	$(PY) -m ruff check .
	$(PY) -m mypy histodd_bench baselines
	$(VENV)/bin/clang-format --dry-run -Werror $(wildcard csrc/*.* csrc/*/*.* tests/emulation/*.h tests/emulation/*/*/*.h)

build: $(STAMPS)/installed

clean:
	rm -rf build dist *.egg-info histodd_bench/_C*.so histodd_bench/_C_reason.txt $(STAMPS)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# Only .venv is ever made; an active environment exists. One that sees a usable torch of the system's Python borrows it.
$(CURDIR)/.venv/bin/python:
	@set -e; for python in $(or $(PYTHON),python3 python3.12 python3.11); do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi; python=; done; \
	if [ -z "$$python" ]; then echo "No Python 3.11 or later found: install one, or make PYTHON=/path/to/python3.12" >&2; exit 1; fi; \
	borrow=$$($$python -c 'import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11); print("--system-site-packages")' 2>/dev/null || true); \
	echo "Making .venv with $$($$python --version) $$borrow"; \
	$$python -m venv $$borrow .venv || { rm -rf .venv; \
	  echo "$$python cannot make virtual environments: install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }

$(STAMPS)/torch: | $(PY)
	@mkdir -p $(STAMPS)
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(VENV) has a Python older than 3.11" >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null || { echo "$(VENV) has no pip: install pip into it first" >&2; exit 1; }
	@if $(PY) -c 'import torch' 2>/dev/null; then \
	  $(PY) -c 'import sys, torch; v = torch.__version__; ok = tuple(map(int, v.split(".")[:2])) >= (2, 11); ok or sys.exit(f"torch {v} is here, 2.11 or later is needed: {sys.executable} -m pip install -U torch torchvision")' || exit 1; \
	  if ! $(PY) -c 'import torchvision' 2>/dev/null; then \
	    version=$$($(PY) -c 'import torch; print(torch.__version__)'); \
	    echo "Installing the torchvision that belongs to torch $$version"; \
	    $(PY) -m pip install --quiet "torch==$$version" torchvision $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
	      || { echo "Install the torchvision that matches torch $$version from where that torch came, then run make again" >&2; exit 1; }; \
	  fi; \
	else \
	  echo "Installing torch and torchvision (several GB; TORCH_INDEX=URL of the CPU-only builds makes it small)"; \
	  $(PY) -m pip install --quiet "torch>=2.11" torchvision $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)); \
	fi
	@touch $@

# The extension is built against the torch of this environment, hence no build isolation.
$(STAMPS)/installed: $(STAMPS)/torch $(TORCH) $(SOURCES)
	@$(PY) -m pip install --quiet "setuptools>=77" wheel ninja
	@arch=$$($(PY) -c 'import torch; print(" ".join(sorted({"%d.%d" % torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})))' 2>/dev/null); \
	export TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-$${arch:-9.0}}"; \
	echo "Installing histodd-bench and compiling its operators"; \
	$(PY) -m pip install --quiet --no-build-isolation -e .
	@cd / && $(PY) -c 'from histodd_bench.ops._extension import build_info as b, missing_reason as r; print("Compiled operators:", ("CPU and CUDA" if b()["cuda"] else "CPU") if b() else "none, " + r())'
	@touch $@

$(STAMPS)/dev: $(STAMPS)/installed
	@$(PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["dev"], sep="\n")' > $@.txt
	@$(PY) -m pip install --quiet -r $@.txt
	@touch $@

$(STAMPS)/bench: $(STAMPS)/dev
	@$(PY) -c 'import tomllib; extra = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; print(*extra["bench"], *extra["peers"], sep="\n")' > $@.txt
	@$(PY) -m pip install --quiet -r $@.txt
	@touch $@
