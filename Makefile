# make demo       installs, and runs the main job
# make test       installs, and runs the tests
# make check      runs the linters and the type checker
# make smoke      runs a trial of every recipe, on tiny data
# make chaos      kills a recipe 200 times at random moments, and compares it with a run that was never killed
# make faults     runs the tests of each fault of docs/reliability.md, and writes its table
# make reference  writes docs/reference.md, which has every key of a recipe
# make docs       builds the documentation as a site, in site/
# All need only python3 (3.11 or newer) and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null)

.PHONY: demo test smoke chaos faults reference docs check install clean

install: $(VENV)/.installed

# Bytecode is compiled here, once: where PYTHONDONTWRITEBYTECODE is set, every worker that Ray starts would otherwise
# parse torch anew. The augmentations are compiled to machine code, too.
$(VENV)/.installed: pyproject.toml constraints.txt
ifdef UV
	test -x $(BIN)/python || uv venv --quiet --python $(PYTHON) $(VENV)
	uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
else
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true # some packages carry files for newer versions of Python
endif
	@$(BIN)/python -c 'from firstlight.pipeline.data.augment.compiled.loading import compiled_ops; \
		print(compiled_ops.load() or "augmentations are compiled")'
	touch $@

demo: install
	$(BIN)/firstlight run conf/recipe/quickstart.yaml

# The tests on Ray run one at a time beside the others, as they often wait. Their output comes last. Only their files
# are imported for them: to collect all tests takes a minute of a CPU.
# Empty, the variable lets Python keep the bytecode of the project: Ray starts a hundred processes, each of which
# imports it.
test: export PYTHONDONTWRITEBYTECODE :=
test: install
	$(BIN)/python -m compileall -qq pipeline tasks
	@$(BIN)/python -m pytest -n 1 --dist loadfile -m 'ray and not slow' \
		$$(grep -rl --include='test_*.py' pytest.mark.ray tests) >$(VENV)/ray_tests.log 2>&1 & ray=$$!; \
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m 'not ray and not slow'; others=$$?; \
	wait $$ray; ray=$$?; cat $(VENV)/ray_tests.log; exit $$((others || ray))

smoke: install
	$(BIN)/python -m tests.scripts.smoke

chaos: install
	$(BIN)/python -m tests.scripts.chaos

faults: install
	$(BIN)/python -m tests.scripts.faults

reference: install
	$(BIN)/python -m firstlight.pipeline.cli.reference docs/reference.md

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

check: install
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --no-cache --check .
	$(BIN)/mypy -p firstlight -p bench

clean:
	rm -rf $(VENV) runs site
