# PYTHON chooses the interpreter. Each Python version has an environment of its own under .venv/,
# so that several can be used side by side; nothing that is up to date is done again.
# CUDA=1 builds the module for GPUs too, which needs nvcc, but no GPU.
# JAX=0.11.2 runs with this version of JAX, in an environment of its own, too.
PYTHON ?= python3
JAX ?=

VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
ifeq ($(VERSION),)
  $(error $(PYTHON) does not run; make PYTHON=... chooses an interpreter)
endif
VENV := .venv/$(VERSION)$(if $(JAX),-jax-$(JAX))
HEADERS := .venv/headers-$(VERSION)
VENV_PYTHON := $(VENV)/bin/python

BUILD_PACKAGES := bazel-bootstrap bazel-platforms bazel-rules-java bazel-rules-proto \
  bazel-skylib g++ iproute2 libgtest-dev
LINT_PACKAGES := clang-format clang-tidy
# Other Pythons (pyenv, conda, ...) bring their headers and venv along.
ifeq ($(shell $(PYTHON) -c 'import sys; print(sys.base_prefix)'),/usr)
  BUILD_PACKAGES += python3-dev python3-venv
endif

BAZEL_FLAGS := --repo_env=JAX_SM_FREE_PYTHON=$(CURDIR)/$(VENV_PYTHON) \
  --repo_env=JAX_SM_FREE_HEADERS=$(CURDIR)/$(HEADERS)
MODULES := _cpu
ifneq ($(CUDA),)
  ifeq ($(shell command -v nvcc),)
    $(error CUDA=1 needs nvcc on the PATH, and there is none)
  endif
  BAZEL_FLAGS += --config=cuda
  MODULES += _cuda
endif
BAZEL_TEST := bazel test $(BAZEL_FLAGS) --test_tag_filters=-python --build_tests_only
# Without it, JAX complains that the CUDA compiler of the set-up finds no CUDA libraries.
export JAX_PLATFORMS ?= cpu

.PHONY: help debian setup build demo bench bench-processes bench-tiers bench-gpu bench-gpu-processes bench-kernels \
  test test-integrations test-gpu kernel-programs sanitize-gpu test-cc test-python test-sanitizers test-wheel \
  lint lint-py lint-cc docs wheel clean
.DELETE_ON_ERROR:

help:
	@echo "make build            the extension, importable from $(VENV_PYTHON)"
	@echo "make demo             train a small mixture-of-experts model on CPU devices"
	@echo "make test             C++ tests, then Python tests"
	@echo "make test-gpu         the tests on this machine's GPUs (with CUDA=1)"
	@echo "make sanitize-gpu     every kernel under compute-sanitizer (with CUDA=1)"
	@echo "make test-sanitizers  C++ tests under address, thread and undefined-behaviour sanitizers"
	@echo "make test-wheel       a wheel built for GPUs runs on a machine without CUDA"
	@echo "make test-integrations  levanter, MaxText, flax, Equinox and Hugging Face's layers (downloads much)"
	@echo "make bench            benchmarks on this machine's CPU"
	@echo "make bench-processes  benchmarks of two processes on this machine's CPU (as root)"
	@echo "make bench-tiers      two tiers beside one, on this machine's CPU (as root)"
	@echo "make bench-gpu        benchmarks on this machine's GPUs (with CUDA=1)"
	@echo "make bench-kernels    what SMs do of an exchange, on one GPU (with CUDA=1)"
	@echo "make bench-gpu-processes  the same in one process and in one for each GPU, side by side"
	@echo "make lint             ruff, mypy, clang-format, clang-tidy"
	@echo "make docs             run what the documentation shows, write the API reference to out/docs"
	@echo "make wheel            a wheel in dist/"
	@echo "make clean            remove what make made"
	@echo "CUDA=1                builds for GPUs too"
	@echo "PYTHON=python3.12 chooses another interpreter (now $(PYTHON), $(VERSION))"
	@echo "JAX=0.9.2             chooses another version of JAX"

# Set-up.

.venv/debian-$(VERSION): tools/install_debian.sh Makefile
	@tools/install_debian.sh $(BUILD_PACKAGES)
	@mkdir -p $(@D) && touch $@

.venv/debian-lint: tools/install_debian.sh Makefile
	@tools/install_debian.sh $(LINT_PACKAGES)
	@mkdir -p $(@D) && touch $@

$(VENV)/ready: tools/setup_venv.sh requirements/dev.txt requirements/lint.txt pyproject.toml \
  | .venv/debian-$(VERSION)
	tools/setup_venv.sh $(PYTHON) $(VENV) $(HEADERS) $(JAX)
	@touch $@

# Headers for GPUs alone.
$(HEADERS)/cuda: requirements/cuda.txt | $(VENV)/ready
	$(VENV_PYTHON) -m pip install -qq --disable-pip-version-check --no-deps --upgrade \
	  --target $(HEADERS) -r $<
	@touch $@

debian: .venv/debian-$(VERSION)

# For a `bazel` called by hand: it uses the Python of the last set-up.
setup: $(VENV)/ready $(if $(CUDA),$(HEADERS)/cuda)
	@echo 'build $(BAZEL_FLAGS)' > .venv/bazelrc

# Build. Bazel itself knows what is up to date.

build: setup
	bazel build $(BAZEL_FLAGS) $(MODULES:%=//jax_sm_free:%.so)
	@$(VENV_PYTHON) tools/place_extension.py "$$(bazel info $(BAZEL_FLAGS) bazel-bin)" $(MODULES)

wheel: setup
	$(if $(CUDA),JAX_SM_FREE_CUDA=1) $(VENV_PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist .
	@ls dist/*.whl

# Run.

demo: build
	$(VENV_PYTHON) examples/train_moe_lm.py

bench: build
	$(VENV_PYTHON) -m benchmarks.cpu

bench-processes: build
	$(VENV_PYTHON) -m benchmarks.processes

bench-tiers: build
	$(VENV_PYTHON) -m benchmarks.tiers --cable

bench-gpu: build
	JAX_PLATFORMS=cuda $(VENV_PYTHON) -m benchmarks.gpu

bench-gpu-processes: build
	JAX_PLATFORMS=cuda $(VENV_PYTHON) -m benchmarks.gpu_processes

# For GPUs, without JAX. The tests have all ranks on one.
KERNELS_TEST := bazel-bin/cc/cuda/kernel_tests/kernels_test_on_gpu
kernel-programs: setup
	bazel build $(BAZEL_FLAGS) //cc/cuda/kernel_tests:kernels_test_on_gpu //benchmarks:kernels

bench-kernels: kernel-programs
	bazel-bin/benchmarks/kernels

test: test-cc test-python

test-cc: setup
	$(BAZEL_TEST) //...

# Neighbouring tests share compiled programs: what one worker starts, it goes on with. A third of the
# time tests wait, so that three workers keep two cores busy.
test-python: build
	$(VENV_PYTHON) -m pytest -n 3 --dist worksteal $(PYTEST_FLAGS)

# Other projects' layers against ours, each in an environment of its own; downloads some gigabytes.
test-integrations:
	$(MAKE) PYTHON=$(shell tools/find_python.sh 3.11) integration-hugging_face
	$(MAKE) PYTHON=$(shell tools/find_python.sh 3.12) \
	  integration-levanter integration-maxtext integration-modules

integration-%: build .venv/integrations/%/ready
	.venv/integrations/$*/bin/python integrations/try_$*.py check

.PRECIOUS: .venv/integrations/%/ready
.venv/integrations/%/ready: requirements/integrations/%.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install -qq --disable-pip-version-check -r $<
	pwd > "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/jax_sm_free.pth"
	@touch $@

test-gpu: build kernel-programs
	$(KERNELS_TEST)
	JAX_PLATFORMS=cuda $(VENV_PYTHON) -m pytest -n 4 -m "not alone"
	JAX_PLATFORMS=cuda $(VENV_PYTHON) -m pytest -n 0 -m alone

# XLA compiles in processes of its own, and compute-sanitizer (2025.3) crashes where it follows them.
SANITIZE := JAX_PLATFORMS=cuda PYTHONPATH=.:tests compute-sanitizer --error-exitcode 1 \
  --target-processes application-only
sanitize-gpu: build kernel-programs
	$(SANITIZE) --tool memcheck $(KERNELS_TEST)
	$(SANITIZE) --tool racecheck $(KERNELS_TEST)
	$(SANITIZE) --tool memcheck --report-api-errors no $(VENV_PYTHON) tests/every_kernel.py
	$(SANITIZE) --tool racecheck $(VENV_PYTHON) tests/every_kernel.py

test-sanitizers: setup
	$(BAZEL_TEST) --config=asan //...
	$(BAZEL_TEST) --config=tsan --test_tag_filters=-python,-no_tsan //...

# With an environment of its own, so it needs PyPI; and nvcc.
test-wheel: setup $(HEADERS)/cuda
	tools/check_wheel.sh $(VENV) $(HEADERS)

lint: lint-py lint-cc

lint-py: setup
	$(VENV_PYTHON) -m ruff check
	$(VENV_PYTHON) -m ruff format --check
	$(VENV_PYTHON) -m mypy

# Sources for GPUs are linted where there is nvcc.
lint-cc: setup .venv/debian-lint $(if $(shell command -v nvcc),$(HEADERS)/cuda)
	tools/lint_cc.sh $(VENV_PYTHON) $(HEADERS)

$(VENV)/docs: requirements/docs.txt | $(VENV)/ready
	$(VENV_PYTHON) -m pip install -qq --disable-pip-version-check -r $<
	@touch $@

docs: build $(VENV)/docs
	$(VENV_PYTHON) tools/make_docs.py out/docs

clean:
	if command -v bazel > /dev/null; then bazel clean; fi
	rm -rf .venv build dist *.egg-info jax_sm_free/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
