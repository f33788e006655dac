# `make demo` and `make test` need nothing but Python 3.11+, pip and this clone.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test test-slow sanitize lint clean
.DELETE_ON_ERROR:

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/*)
	@$(PYTHON) -c 'import sys; sys.exit("afds needs Python 3.11 or newer, found " + sys.version.split()[0] + ": name one, as in make PYTHON=python3.12 demo") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/afds demo

# Two programs that spin on two cores slow each other twentyfold: passive waiting, one thread a worker.
test: $(STAMP) lint
	OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-slow: $(STAMP)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m 'slow or data'

# The runtime's tests on kernels built under sanitizers (g++; minutes to compile): SANITIZER=address,undefined or thread.
# -S leaves out the editable install, which would come before the build under test; libstdc++ is preloaded so that
# the sanitizer finds the exceptions it is to watch; CPython itself leaks, and torch's own threads are not watched.
# Where threads are watched the tests that fork or end amid a call are left out. Arguments of pytest: ARGS='-k family'.
SANITIZER := address,undefined
comma := ,
SANITIZED := build/sanitized-$(firstword $(subst $(comma), ,$(SANITIZER)))
SAFETY := --deselect=tests/test_runtime_safety.py::test_
UNSANITIZED := $(if $(filter thread,$(SANITIZER)),$(SAFETY)forked_children_predict_and_end \
  $(SAFETY)a_model_that_was_loaded_before_a_server_forks \
  $(SAFETY)a_daemon_thread_may_be_predicting_when_the_program_ends)
sanitize: $(SANITIZED)/.built
	LD_PRELOAD="$$(g++ -print-file-name=lib$(if $(filter thread,$(SANITIZER)),tsan,asan).so) $$(g++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=ignore_noninstrumented_modules=1 \
	OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 \
	PYTHONPATH="$(SANITIZED):$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
	$(BIN)/python -S -m pytest -p no:cacheprovider tests/test_runtime.py tests/test_runtime_bf16.py \
	  tests/test_runtime_choice.py tests/test_runtime_safety.py $(UNSANITIZED) $(ARGS)

$(SANITIZED)/.built: $(STAMP) CMakeLists.txt $(wildcard kernels/* src/afds/*.py src/afds/*/*.py)
	rm -rf $(SANITIZED)
	CXX=g++ $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(SANITIZED) . \
	  -C build-dir=$(SANITIZED)-objects -C cmake.build-type=RelWithDebInfo "-C" "cmake.define.AFDS_SANITIZE=$(SANITIZER)"
	@touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
