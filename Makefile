# One word for each thing one does with TriAxial. Every target installs what it needs (Debian 12, apt), configures a
# CMake preset and builds; `cmake --preset` and `ctest --preset` do the same by hand.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help build demo serve fidelity test test-unit test-gpu sanitize-gpu bench-gpu format format-check tidy clean setup-build setup-test setup-tidy configure-release

BINARY := build/release/triaxial
DEMO := tools/demo.sh
# Root may build in a user's clone, which git would refuse to list.
SOURCES := git -c safe.directory='*' ls-files '*.cc' '*.h' '*.cu' '*.cuh'
# What `make tidy` compares with: the files changed since then are checked.
BASE ?= $(shell git rev-parse -q --verify origin/main 2>/dev/null || echo HEAD~)

help:
	@echo "make demo       build, then play recorded agent sessions against the server and compare KV formats"
	@echo "make serve      build, then serve the pocket agent over HTTP; ARGS=\"--port 8000 --model DIR\""
	@echo "make fidelity   what each KV policy costs in exactness, on plain and hard checkpoints; about 20 minutes"
	@echo "make build      build the one binary, $(BINARY)"
	@echo "make test       everything that CI runs: format check, all tests, parsers and cache under sanitizers"
	@echo "make test-unit  the unit tests, in under a minute once built"
	@echo "make test-gpu   tests of the CUDA kernels; needs a GPU, the CUDA toolkit, CMake and a C++ compiler alone"
	@echo "make sanitize-gpu  the same under compute-sanitizer: memory errors, then races; some minutes"
	@echo "make bench-gpu  their benchmark on this GPU, beside its own libraries; JSON in build/gpu/results"
	@echo "make format     reformat all sources in place"
	@echo "make tidy       clang-tidy on the files changed since BASE=$(BASE); ALL=1 for every file"
	@echo "make clean      remove build/"

build: configure-release
	cmake --build --preset release --target triaxial

demo: build
	$(DEMO) $(ARGS)

serve: build
	$(BINARY) serve $(ARGS)

fidelity: setup-test configure-release
	cmake --build --preset release --target triaxial --target hard_checkpoint --target fit_kv_calibration
	tools/fidelity.sh

test: setup-test format-check configure-release
	cmake --build --preset release
	ctest --preset release
	cmake --preset asan
	cmake --build --preset asan --target tests_unit tests_fuzz
	ctest --preset asan

test-unit: configure-release
	cmake --build --preset release --target tests_unit
	ctest --preset release -L unit

test-gpu:
	cmake --preset gpu
	cmake --build --preset gpu -j --target gpu_tests
	ctest --test-dir build/gpu --output-on-failure
	@if cmake --preset cuda >/dev/null 2>&1; then \
	  cmake --build --preset cuda --target model_golden_test engine_golden_test && \
	  TRIAXIAL_REQUIRE_GPU=1 ctest --test-dir build/cuda --output-on-failure -R '^(model|engine)_golden_test$$'; \
	else echo "the project's libraries are not installed here: no golden tests of the model (docs/cuda.md)"; fi

# Memory errors on everything; races on smaller sizes of the same kinds, of our own kernels.
sanitize-gpu:
	cmake --preset gpu
	cmake --build --preset gpu -j --target gpu_tests
	export PATH="$$PATH:/usr/local/cuda/bin"; for test in attention kv_store ops; do \
	  compute-sanitizer --tool memcheck --error-exitcode 1 build/gpu/bin/cuda_$${test}_test; \
	  TRIAXIAL_GPU_SMALL=1 compute-sanitizer --tool racecheck --kernel-name kernel_substring=triaxial --error-exitcode 1 \
	    build/gpu/bin/cuda_$${test}_test; \
	done

bench-gpu:
	cmake --preset gpu
	cmake --build --preset gpu -j --target kernel_bench
	tools/bench_gpu.sh

format: setup-test
	$(SOURCES) | xargs -r clang-format -i

format-check: setup-test
	@echo "checking the format of all sources (make format repairs it)"
	@$(SOURCES) | xargs -r clang-format --dry-run --Werror

tidy: setup-tidy configure-release
	files=$$($(if $(ALL),git ls-files,git diff --name-only --diff-filter=d $(BASE) --) '*.cc'); \
	if [ -n "$$files" ]; then clang-tidy -p build/release --quiet --extra-arg=-Wno-unknown-warning-option $$files; else echo "no changed sources"; fi

clean:
	rm -rf build

configure-release: setup-build
	cmake --preset release

setup-build setup-test setup-tidy: setup-%:
	@tools/setup.sh $*
