# Every target makes the environment it needs; none needs an activated one.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
NOTEBOOKS_STAMP := $(VENV)/.installed-notebooks
FUZZ_STAMP := $(VENV)/.installed-fuzz
RELEASE_STAMP := $(VENV)/.installed-release
FUZZ_SECONDS ?= 60
# A file's tests stay together: they share what is made once. tests/conftest.py has the order of the files.
ON_ALL_CORES := --numprocesses auto --dist loadfile --no-loadscope-reorder
# Versions of transformers besides the newest one, which constraints.txt pins: the lowest that pyproject.toml admits, and
# the one before the newest.
LOWEST_TRANSFORMERS := $(shell sed -n 's/^ *"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
PREVIOUS_TRANSFORMERS := 5.23
OLDER := $(LOWEST_TRANSFORMERS) $(PREVIOUS_TRANSFORMERS)
# What the lowest needs in older form than the newest one does; the rest is shared with $(VENV).
BESIDE_$(LOWEST_TRANSFORMERS) := 'huggingface_hub<2' 'httpx<1' 'httpcore<2'
# What must hold on each of them in every change: what kvtier relies on, every mode of generate(), edited histories.
ON_EACH := tests/contract tests/hf/generate/test_generate_modes.py tests/hf/generate/test_argument_names.py \
    tests/hf/turn/test_edited_history.py
# What `make test` runs on the test device: its own tests, and a sample of turns. CONTRIBUTING.md says how to run the rest.
ON_THE_TEST_DEVICE := tests/testing/device/test_device_machine.py tests/transfer/test_engines.py tests/gpu/test_turns.py \
    tests/gpu/test_beside.py tests/hf/turn/test_report.py
NEWEST := .venv-newest
PIP_INSTALL := $(BIN)/pip install --quiet --constraint constraints.txt

.PHONY: demo test test-all check contract format wheel release-check bench sweep docs notebooks older newest fuzz crash clean
.PHONY: $(OLDER:%=contract-%) $(OLDER:%=older-%)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
# torch first and on its own: with it in place, no other package's range can pull in another build of it.
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --editable '.[dev,demo]'
	touch $@

$(DOCS_STAMP): $(STAMP)
	$(PIP_INSTALL) --editable '.[docs]'
	touch $@

$(NOTEBOOKS_STAMP): $(STAMP)
	$(PIP_INSTALL) --editable '.[notebooks]'
	touch $@

$(FUZZ_STAMP): $(STAMP)
	$(PIP_INSTALL) --editable '.[fuzz]'
	touch $@

$(RELEASE_STAMP): $(STAMP)
	$(PIP_INSTALL) --editable '.[release]'
	touch $@

demo: $(STAMP)  ## three turns on a long document, the last one in a new process
	$(BIN)/kvtier demo

test: $(STAMP)  ## all tests; and those that need an accelerator, on the test device
	$(BIN)/python -m pytest $(ON_ALL_CORES)
	KVTIER_DEVICE=test $(BIN)/python -m pytest -q $(ON_ALL_CORES) $(ON_THE_TEST_DEVICE)

# The same tests with other examples every time, hours of them: faults at every point, kills and races at full length.
test-all: $(STAMP)  ## all tests at length
	HYPOTHESIS_PROFILE=nightly KVTIER_SAMPLE=all KVTIER_BEHAVIOURS=all KVTIER_INTERRUPT_POINTS=100 KVTIER_FAULT_STRIDE=1 KVTIER_KILLS=1000 \
	    KVTIER_RACE_TURNS=500 KVTIER_SWEEP=all $(BIN)/python -m pytest $(ON_ALL_CORES)

check: $(STAMP) wheel contract  ## lint, format, types, layering, a wheel that imports, and older transformers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Only the older packages are installed, in front of the environment's own: an environment more would hold a second
# torch. `make test` holds the newest version to the same contract.
build/transformers-%/.installed: $(STAMP) Makefile
	rm -rf build/transformers-$*
	$(BIN)/pip install --quiet --no-deps --target build/transformers-$* 'transformers==$*.*' $(BESIDE_$*)
	touch $@

contract: $(OLDER:%=contract-%)  ## what kvtier relies on upstream, modes and edited histories, on older transformers

$(OLDER:%=contract-%): contract-%: build/transformers-%/.installed
	PYTHONPATH=$(CURDIR)/build/transformers-$* KVTIER_TRANSFORMERS=$* $(BIN)/python -m pytest -q $(ON_ALL_CORES) $(ON_EACH)

older: $(OLDER:%=older-%)  ## all tests on older transformers; about a quarter of an hour each

$(OLDER:%=older-%): older-%: build/transformers-%/.installed
	PYTHONPATH=$(CURDIR)/build/transformers-$* KVTIER_TRANSFORMERS=$* $(BIN)/python -m pytest -q $(ON_ALL_CORES)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The wheel is imported from an empty environment that borrows only the dependencies: a file that the wheel
# forgot is missing there, although the editable install has it.
wheel: $(STAMP)
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/python -m build --wheel --no-isolation --outdir build/wheel . > build/wheel/build.log \
	    || { cat build/wheel/build.log; exit 1; }
	$(BIN)/python -m venv --without-pip build/wheel/venv
	$(BIN)/python -m pip --python build/wheel/venv/bin/python install --quiet --no-deps --no-index build/wheel/*.whl
	cd build/wheel && PYTHONPATH="$$(../../$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
	    venv/bin/python -P -c 'import sys; \
	sys.path[:] = [p for p in sys.path if "__editable__" not in p]; \
	sys.path.sort(key=lambda p: "build/wheel/venv" not in p); \
	import kvtier, kvtier.cli, pathlib; where = pathlib.Path(kvtier.__file__); \
	assert "wheel/venv" in where.as_posix(), where; \
	assert (where.parent / "py.typed").exists() and (where.parent / "cli" / "demo" / "lighthouse.txt").exists(); \
	print("wheel: kvtier imports from", where.parent.relative_to(pathlib.Path.cwd()))'

# Leaves both files in dist/. Each new environment shares torch, and the libraries of its accelerator, with $(VENV); pip
# installs all else that kvtier requires. Needs the package index alone.
release-check: $(RELEASE_STAMP)  ## sdist and wheel: contents, metadata, and each installed in a new environment and used
	$(BIN)/python -m release

bench: $(STAMP)  ## how fast it is, in ratios; see benchmarks/README.md
	$(BIN)/python -m benchmarks

sweep: $(STAMP)  ## every causal language model, tiny, with kvtier; writes docs/models.md; see sweep/README.md
	OMP_NUM_THREADS=1 $(BIN)/python -m sweep

docs: $(DOCS_STAMP)  ## the documentation, as files to open in a browser: site/index.html; any warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	! grep -rE --include='*.html' '<(script|img|iframe|link)[^>]*(src|href)="(https?:)?//' site  # a page asks no network

notebooks: $(NOTEBOOKS_STAMP)  ## executes them again; NOTEBOOKS='quickstart.ipynb' that one alone
	$(BIN)/python notebooks/execute.py $(NOTEBOOKS)

# An environment of its own: what this transformers needs may be newer than any pin.
newest: $(STAMP)  ## whatever transformers the index has today, pre-releases too: contract, modes, edited histories, sweep
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install --quiet --constraint constraints.txt torch
	grep -vE '^(transformers|huggingface_hub|hf-xet|tokenizers|safetensors)==' constraints.txt > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/pip install --quiet --upgrade --pre --constraint $(NEWEST)/constraints.txt transformers --editable '.[dev,demo]'
	$(NEWEST)/bin/python -c 'import transformers; print("transformers", transformers.__version__)'
	$(NEWEST)/bin/python -m pytest -q $(ON_ALL_CORES) $(ON_EACH)
	mkdir -p build/newest && cp docs/models.md docs/models.json build/newest
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m sweep --output build/newest/sweep.json --pages build/newest

fuzz: $(FUZZ_STAMP)  ## bytes chosen by the code they reach, against the readers of files; FUZZ_SECONDS=60
	mkdir -p build/fuzz
	PYTHONPATH=. $(BIN)/python tests/fuzz/coverage_guided.py -max_total_time=$(FUZZ_SECONDS) -timeout=10 -rss_limit_mb=2048 \
	    -max_len=65536 -artifact_prefix=build/fuzz/ build/fuzz tests/fuzz/corpus

crash: $(STAMP)  ## a thousand killed processes, and races at full length; about ten minutes
	KVTIER_KILLS=1000 KVTIER_RACE_TURNS=500 $(BIN)/python -m pytest tests/system/test_crash.py tests/system/test_race.py

clean:
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
