# Works in .venv, where it installs the package as a user would: built, not linked to the source folder.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard csrc/*.h csrc/*.cuh csrc/*.cpp csrc/*.cu)
BENCHMARKS := $(wildcard benchmarks/gpu/*.cu benchmarks/speed/*.cpp)
EMULATION := $(wildcard tests/cuda_on_cpu/*.h tests/cuda_on_cpu/*.cpp tests/kernels/*.cpp)
SOURCES := setup.py MANIFEST.in $(NATIVE) $(shell find llc_fast -name '*.py*' -not -path '*/__pycache__/*') llc_fast/py.typed

.DEFAULT_GOAL := help
.PHONY: help demo notebooks test test-gpu test-all fuzz sanitize docs docs-links lint format clean

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.installed-all ## Install, then estimate learning coefficients whose true values are known
	$(BIN)/llc-fast demo

notebooks: $(VENV)/.installed-test ## Install, then run the notebooks of examples/ at full settings and keep their outputs
	OMP_NUM_THREADS=1 $(BIN)/python examples/execute.py

# Not `python -m pytest`: that imports llc_fast from this folder, where no native module was built.
# One thread each: what needs more sets them itself.
PROCESSES ?= 2
test: $(VENV)/.installed-test ## Install, then run all tests but the slow ones, in PROCESSES=2
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(PROCESSES) -m "not slow"

test-gpu: $(VENV)/.installed-test ## Run the tests of the CUDA path: on a GPU, or by CUDA emulation on the CPU
	PYTHONPATH=tests $(BIN)/pytest -p cuda_on_cpu -m gpu

test-all: $(VENV)/.installed-test ## Install, then run all tests
	$(BIN)/pytest

FUZZ ?= 10000
fuzz: $(VENV)/.installed-test ## Run FUZZ=10000 random examples of optimizers, and a fifth of it of estimates
	LLC_FAST_FUZZ=$(FUZZ) $(BIN)/pytest tests/fuzz

# Beside .venv's own build, which stays as it is. The sanitizers' libraries must come before all others of the process;
# and Python must ask malloc for every object, so that its own errors are seen too.
SANITIZED := $(CURDIR)/build/sanitized
sanitize: $(VENV)/.installed-test ## Test the native module under AddressSanitizer and UndefinedBehaviorSanitizer
	rm -rf $(SANITIZED) build/lib*
	LLC_FAST_SANITIZE=1 LLC_FAST_CUDA=0 $(BIN)/pip install --quiet --no-deps --target $(SANITIZED) .
	libraries="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)"; \
	LD_PRELOAD="$$libraries" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc \
	LLC_FAST_SANITIZE=1 PYTHONPATH=$(SANITIZED) $(BIN)/pytest -m "not slow" $(SANITIZE)
# Without sharded models and torch.compile, whose processes and compiler take minutes like this.
SANITIZE ?= --ignore=tests/kernels/test_sharding.py --ignore=tests/kernels/test_operator.py tests/kernels tests/gradients/test_program.py tests/gradients/test_matmul.py tests/test_optim.py tests/test_optim_faults.py tests/fuzz/test_fuzz_optimizers.py

# Any warning is an error, so that links, headings and names in docstrings lead somewhere. It needs no network.
docs: $(VENV)/.installed-docs ## Build the documentation site into build/docs
	$(BIN)/sphinx-build -q -E -W --keep-going -d build/docs-trees docs build/docs
	@echo "The site is in build/docs: open build/docs/index.html"

docs-links: $(VENV)/.installed-docs ## Try all links of the documentation that lead to other sites
	$(BIN)/sphinx-build -q -b linkcheck -d build/docs-trees docs build/docs-links

lint: $(VENV)/.installed-tools ## Check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(NATIVE) $(BENCHMARKS) $(EMULATION)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(BIN)/check-jsonschema --builtin-schema vendor.readthedocs .readthedocs.yaml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

format: $(VENV)/.installed-tools ## Rewrite the sources in this style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(NATIVE) $(BENCHMARKS) $(EMULATION)

clean: ## Remove .venv and everything built
	rm -rf $(VENV) build dist docs/examples *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "llc_fast needs Python 3.10 or newer; $(PYTHON) is not. Try: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

# build/lib is setuptools' copy of the package. It would put modules that were deleted since into the wheel.
$(VENV)/.installed-%: pyproject.toml constraints.txt $(SOURCES) $(VENV)/.created
	@echo "Installing llc_fast[$*] into $(VENV); the first time takes a few minutes."
	rm -rf build/lib*
	$(BIN)/pip install --quiet --constraint constraints.txt ".[$*]"
	touch $@

# The linters read the source folder, so a changed source file needs no new installation.
$(VENV)/.installed-tools: pyproject.toml constraints.txt $(VENV)/.created
	@echo "Installing llc_fast[dev] into $(VENV); the first time takes a few minutes."
	$(BIN)/pip install --quiet --constraint constraints.txt ".[dev]"
	touch $@
