# Every target makes the environment it needs; none needs an activated one.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
NOTEBOOKS_STAMP := $(VENV)/.installed-notebooks
FUZZ_STAMP := $(VENV)/.installed-fuzz
FUZZ_SECONDS ?= 60
# A file's tests stay together: they share what is made once.
ON_ALL_CORES := --numprocesses auto --dist loadfile
LOWEST := .venv-lowest
LOWEST_TRANSFORMERS := 5.17
# What that version needs in older form than the newest one does; the rest is shared with $(VENV).
BESIDE_LOWEST := 'huggingface_hub<2' 'httpx<1' 'httpcore<2'
CONTRACT := build/lowest-transformers
PIP_INSTALL := $(BIN)/pip install --quiet --constraint constraints.txt

.PHONY: demo test check contract format wheel bench sweep docs notebooks test-lowest fuzz crash clean

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

demo: $(STAMP)  ## three turns on a long document, the last one in a new process
	$(BIN)/kvtier demo

test: $(STAMP)
	$(BIN)/python -m pytest $(ON_ALL_CORES)

check: $(STAMP) wheel contract  ## lint, format, types, layering, a wheel that imports, and the oldest transformers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Only the older packages are installed, in front of the environment's own: an environment more would hold a second
# torch. `make test` holds the newest version to the same contract.
$(CONTRACT)/.installed: $(STAMP) Makefile
	rm -rf $(CONTRACT)
	$(BIN)/pip install --quiet --no-deps --target $(CONTRACT) 'transformers==$(LOWEST_TRANSFORMERS).*' $(BESIDE_LOWEST)
	touch $@

contract: $(CONTRACT)/.installed  ## what kvtier relies on upstream, on the oldest transformers that is supported
	PYTHONPATH=$(CURDIR)/$(CONTRACT) KVTIER_TRANSFORMERS=$(LOWEST_TRANSFORMERS) $(BIN)/python -m pytest -q tests/contract tests/integration/test_generate_modes.py

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
	assert (where.parent / "py.typed").exists() and (where.parent / "cli" / "lighthouse.txt").exists(); \
	print("wheel: kvtier imports from", where.parent.relative_to(pathlib.Path.cwd()))'

bench: $(STAMP)  ## how fast it is, in ratios; see benchmarks/README.md
	$(BIN)/python -m benchmarks

sweep: $(STAMP)  ## every causal language model, tiny, with kvtier; writes docs/models.md; see sweep/README.md
	OMP_NUM_THREADS=1 $(BIN)/python -m sweep

docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

notebooks: $(NOTEBOOKS_STAMP)
	$(BIN)/python notebooks/execute.py

test-lowest: $(STAMP)  ## the oldest transformers that pyproject.toml admits
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --constraint constraints.txt torch
	grep -vE '^(transformers|huggingface_hub|hf-xet)==' constraints.txt > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/pip install --quiet --constraint $(LOWEST)/constraints.txt 'transformers==$(LOWEST_TRANSFORMERS).*' --editable '.[dev,demo]'
	$(LOWEST)/bin/python -m pytest

fuzz: $(FUZZ_STAMP)  ## bytes chosen by the code they reach, against the readers of files; FUZZ_SECONDS=60
	mkdir -p build/fuzz
	$(BIN)/python tests/fuzz/coverage_guided.py -max_total_time=$(FUZZ_SECONDS) -timeout=10 -rss_limit_mb=2048 \
	    -max_len=65536 -artifact_prefix=build/fuzz/ build/fuzz tests/fuzz/corpus

crash: $(STAMP)  ## a thousand killed processes, and races at full length; about ten minutes
	KVTIER_KILLS=1000 KVTIER_RACE_TURNS=500 $(BIN)/python -m pytest tests/integration/test_crash.py tests/integration/test_race.py

clean:
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
