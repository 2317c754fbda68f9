# make demo    train a small GPT on Python's own source, from nothing to a sample (4 to 8 minutes on two cores)
# make test    all tests but the long ones (11 minutes on two cores, set-up included)
# make faults  every promise about faults at its full number of trials, in build/faults.json (9 minutes on two cores)
# make compat  tests with the oldest PyTorch and Triton that are promised, and the same compiled modules (6 minutes of one core)
# make gates   compile every Triton and CUDA kernel for sm_80, sm_90 and sm_100, hold it against benchmarks/*_budget.json
# make asan    CUDA kernels on the CPU under ASan and UBSan; make race: under TSan (4 and 18 minutes beside other work)
# make bench   every benchmark of this machine into benchmarks/results, then its pictures and tables (15 minutes; LIMIT=5)
# make gpu     where there is an NVIDIA GPU: build, run all GPU tests and benchmarks, results in build/gpu (stops after 9 minutes)
# make sanitize  where there is an NVIDIA GPU: compute-sanitizer over the tests of the CUDA kernels
# All but the last two make .venv first, with the pinned packages of requirements*.txt. Choose the interpreter with PYTHON=python3.12.

PYTHON ?= python3
BIN := .venv/bin
# Three files of tests at a time, each in one process: a file's tests share what they have made, and some only wait.
# One: make test WORKERS=
WORKERS := -n 3 --dist loadfile --no-loadscope-reorder
CSRC := $(wildcard csrc/*.* csrc/device/* csrc/simt/*)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
NO_PIP := { echo "megakern: pip could not install them; is there a network, or an index (pip config list)? Then run the \
same make again" >&2; exit 1; }

.PHONY: help setup demo simt test test-all compat faults gates asan race gpu sanitize lint bench clean
help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

setup: .venv/runtime
.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "megakern needs Python 3.10 or newer; got $$($(PYTHON) --version). Name one: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv .venv

.venv/runtime: .venv/bin/python requirements.txt pyproject.toml setup.py csrc/build.py $(wildcard csrc/cpu/*)
	@echo "installing PyTorch and what else requirements.txt has: half a minute, or as long as its download takes"
	@$(PIP) -r requirements.txt || $(NO_PIP)
	@echo "installing megakern; where there is a C++ compiler its kernels for CPUs are compiled: less than a minute"
	@$(PIP) --no-deps --no-build-isolation --editable .
	@$(BIN)/python -m megakern.kernels.torch.native
	@touch $@

.venv/dev: .venv/runtime .venv/simt requirements-dev.txt
	@echo "installing what the tests need: requirements-dev.txt"
	@$(PIP) -r requirements-dev.txt || $(NO_PIP)
	@touch $@

# The CUDA kernels for CPU tensors, which the tests run. Without a C++ compiler the tests leave them out.
simt: .venv/simt
.venv/simt: .venv/runtime $(CSRC)
	$(BIN)/python csrc/build.py simt
	@touch $@

demo: .venv/runtime
	$(BIN)/python examples/demo.py

test: .venv/dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pytest -m "not slow" --durations=10 $(WORKERS)

test-all: .venv/dev
	$(BIN)/python -m pytest --durations=20

# In front of .venv stand the packages of requirements-oldest.txt; megakern is this folder, with its compiled modules.
.compat/ready: .venv/dev requirements-oldest.txt
	$(BIN)/python -m venv .compat
	@echo "installing requirements-oldest.txt: with what this PyTorch brings for GPUs 5 GB"
	@.compat/bin/python -m pip --disable-pip-version-check install --quiet -r requirements-oldest.txt || $(NO_PIP)
	@printf '%s\n' "$(CURDIR)" "$$($(BIN)/python -c '$(SITE)')" > "$$(.compat/bin/python -c '$(SITE)')/megakern.pth"
	@touch $@

SITE := import sysconfig; print(sysconfig.get_path("purelib"))
COMPAT := modules dispatch autocast norm linear attention activation cross_entropy linear_cross_entropy mlp rope dropout \
  adamw grad_norm cpu_kernels cpu_products shared collectives tensor_parallel sequence_parallel data_parallel overlap \
  masters fp32_gradients gpt engine generate trainer resume checkpoint_pairs lora memory verify plan patch_swap \
  triton_compile triton_interpreter tune simt
compat: .compat/ready
	.compat/bin/python -m pytest -m "not slow" --durations=10 $(WORKERS) $(COMPAT:%=tests/test_%.py)

# With "=": a file that is there already would pass for the tests to run, and our own options be unknown.
faults: .venv/dev
	$(BIN)/python -m pytest -vv -m promise --faults=build/faults.json --durations=20

gates: .venv/dev
	$(BIN)/python -m benchmarks.compile_report --check
	$(BIN)/python -m benchmarks.cuda_report --check
	$(BIN)/python -m pytest tests/test_modules.py

# The emulator and the CUDA kernels on the CPU: steps outside of tensors; accesses that no barrier orders.
asan: .venv/dev
	$(BIN)/python -m tests.sanitized address
race: .venv/dev
	$(BIN)/python -m tests.sanitized thread

# With the machine's own Python, as `make gpu`: compute-sanitizer over the small shapes of tests/kernels.
sanitize:
	$(PYTHON) -m benchmarks.sanitize

# With the machine's own Python, which has a torch for its GPU: nothing is installed. GPU="--only bench --ops norm".
gpu:
	$(PYTHON) -m benchmarks.gpu $(GPU)

lint: .venv/dev
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

# MACHINE names the folder of results (default: the one of this processor, or a new one).
LIMIT ?= 15
bench: .venv/dev
	$(BIN)/python -m benchmarks.record --minutes $(LIMIT) $(if $(MACHINE),--machine $(MACHINE))

clean:
	rm -rf .venv .compat build dist *.egg-info demo megakern/*.so
