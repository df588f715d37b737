# make demo   the main job: three language models on real text, stock PyTorch against pykernels
# make test   the whole suite (every kernel executed; no GPU needed)
# make bench BENCH_ARGS=--quick   every row with a target in three minutes, and bench.html
# Both make .venv here on first use, or use the interpreter they find when it already has torch.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
WORKERS ?= 2

# An older torch than pyproject.toml asks for would be replaced by pip; that environment is left alone.
HAS_TORCH := $(shell $(PYTHON) -c "import torch; assert tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 11)" \
    2>/dev/null && echo yes)
ifeq ($(HAS_TORCH),yes)
PY := $(PYTHON)
STATE := build
else
PY := .venv/bin/python
STATE := .venv
endif
SOURCES := setup.py pyproject.toml $(wildcard csrc/*/*)

.PHONY: demo test bench lint lint-text lint-kernels gpu docs wheel build build-all clean

demo: $(STATE)/.built-cpu
	$(PY) -m pykernels demo --report demo.html

test: $(STATE)/.built-all $(STATE)/.extras
	$(PY) -m pytest -q -n $(WORKERS) --dist loadgroup tests

bench: $(STATE)/.built-cpu
	$(PY) -m pykernels bench --html bench.html $(BENCH_ARGS)

lint: lint-text lint-kernels

lint-text: $(STATE)/.extras
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	"$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("scripts"))')/clang-format" --dry-run --Werror $(wildcard csrc/*/*)

lint-kernels: $(STATE)/.built-all $(STATE)/.extras
	$(PY) -m pykernels.testing.aot

gpu:
	$(PYTHON) benchmarks/gpu.py $(GPU_ARGS)

# The generated parts of README.md and docs/ (support matrix, measured tables), then the site, in site/.
docs: $(STATE)/.built-cpu
	$(PY) -m pykernels.testing.support --write README.md
	$(PY) benchmarks/report.py
	$(PY) benchmarks/pictures.py
	$(PY) -c "import mkdocstrings, material" 2>/dev/null || $(PY) -m pip install -q "mkdocs-material>=9.6" "mkdocstrings[python]>=0.29"
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build -q

wheel: $(STATE)/.packages
	PYKERNELS_BUILD=auto $(PY) -m pip wheel . --no-build-isolation --no-deps -w dist

build: $(STATE)/.built-cpu
build-all: $(STATE)/.built-all $(STATE)/.extras

# What would fail minutes later, said at once and with the way out.
$(STATE)/.packages: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 10) and "pykernels needs Python 3.10 or later; \
	$(PYTHON) is %d.%d. Name another: make $(MAKECMDGOALS) PYTHON=python3.12" % v)'
	@command -v $${CXX:-g++} > /dev/null || { echo "The CPU kernels need a C++ compiler: apt install g++ (or name \
	yours: CXX=...). Without one: pip install ."; exit 1; }
	@[ "$(HAS_TORCH)" = yes ] || echo "torch into .venv (this interpreter has none of 2.11 or later)"
	@[ "$(HAS_TORCH)" = yes ] || $(PYTHON) -m venv .venv
	@[ "$(HAS_TORCH)" = yes ] || $(PY) -m pip install -q "$(TORCH)" "$(TRITON)" numpy  # torch warns without numpy
	@$(PY) -m pip install -q "setuptools>=77" wheel "pybind11>=2.13" ninja
	@mkdir -p $(STATE) && touch $@

# Only what the demo needs; no nvcc, no emulator.
$(STATE)/.built-cpu: $(STATE)/.packages $(SOURCES)
	@echo "Compiling the CPU kernels (some minutes, once)"
	PYKERNELS_BUILD=cpu $(PY) -m pip install -q -e . --no-build-isolation
	@touch $@

$(STATE)/.built-all: $(STATE)/.packages $(SOURCES)
	@echo "Compiling the CPU kernels, the emulator and, where nvcc is found, the CUDA kernels (some minutes, once)"
	@PYKERNELS_BUILD=all $(PY) setup.py -q build_ext --inplace > $(STATE)/build.log 2>&1 \
	|| { cat $(STATE)/build.log; exit 1; }
	@touch $@

# Of its own, so that under -j the compilers work while pip waits for the network.
$(STATE)/.extras: $(STATE)/.packages pyproject.toml
	PYKERNELS_BUILD=none $(PY) -m pip install -q -e ".[test,lint]" --no-build-isolation
	@touch $@

clean:
	rm -rf build dist *.egg-info pykernels/*.so pykernels/_cpu_ext.torch .venv
