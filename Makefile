# Everything runs in .venv, which is created from requirements.lock by the first target that needs it.
# The next call completes an interrupted installation and installs a changed lock.

# The first interpreter on the PATH that is new enough. To use another: make venv PYTHON=/path/to/python3.12
NEW_ENOUGH = import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c '$(NEW_ENOUGH)' >/dev/null 2>&1 && { echo $$python; break; }; done)

VENV_PYTHON = .venv/bin/python
INSTALLED = .venv/installed.lock

# Hides TensorFlow's start-up lines and caches the programs that JAX compiles. On the CPU a step allocates and frees
# hundreds of MB: huge pages and keeping freed memory save a quarter of its time.
MALLOC = glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=10000000000
RUN = GLIBC_TUNABLES=$(MALLOC) TF_CPP_MIN_LOG_LEVEL=3 TF_ENABLE_ONEDNN_OPTS=0 JAX_PLATFORMS=cpu \
	JAX_COMPILATION_CACHE_DIR=.cache/jax $(VENV_PYTHON)

DEMO_CONFIG ?= configs/demo.py
DEMO_DIR ?= runs/demo
DEMO_ARGS ?=
TEST_ARGS ?=
LOCK_ARGS ?=
# Compilation uses one core, so test files run in parallel. A process takes about 3 GB.
TEST_PROCESSES ?= $(shell n=$$(nproc); echo $$((n < 4 ? n : 4)))

.DEFAULT_GOAL := help
.PHONY: help venv demo demo-model demo-smoke test ci-needs parity lint docs lock format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

venv:  ## create .venv and install the pinned packages (PYTHON=... chooses the interpreter)
	@cmp -s requirements.lock $(INSTALLED) || $(MAKE) --no-print-directory $(INSTALLED)

# Run by `venv` only if the lock differs from the copy of the last complete installation.
.PHONY: $(INSTALLED)
$(INSTALLED):
	@if ! $(VENV_PYTHON) -m pip --version >/dev/null 2>&1; then \
		python="$(PYTHON)"; \
		if [ -z "$$python" ]; then \
			echo "error: no python3.11, python3.12, python3.13 or python3 on the PATH is Python 3.11 or newer: apt install python3, or make venv PYTHON=/path/to/python3.11" >&2; exit 2; \
		fi; \
		if ! "$$python" -c '$(NEW_ENOUGH)' >/dev/null 2>&1; then \
			echo "error: PYTHON=$$python is not Python 3.11 or newer" >&2; exit 2; \
		fi; \
		if ! "$$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then \
			echo "error: $$python cannot create a virtual environment: apt install python3-venv" >&2; exit 2; \
		fi; \
		echo "Creating .venv with $$("$$python" --version)"; \
		"$$python" -m venv --clear .venv; \
	fi
	@echo "Installing requirements.lock into .venv (a few minutes, about 3 GB on disk)"
	@$(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	@$(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@cp requirements.lock $(INSTALLED)

demo: venv  ## train, evaluate and predict on built-in scenes, on the CPU (DEMO_ARGS=... adds flags)
	@$(RUN) main.py --config=$(DEMO_CONFIG) --workdir=$(DEMO_DIR) $(DEMO_ARGS)
	@$(RUN) main.py --mode=evaluate --workdir=$(DEMO_DIR) $(DEMO_ARGS)
	@$(RUN) -m input_pipeline.scenes --output=$(DEMO_DIR)/samples
	@$(RUN) main.py --mode=predict --workdir=$(DEMO_DIR) $(DEMO_ARGS) \
		--images=$(DEMO_DIR)/samples --output=$(DEMO_DIR)/predictions
	@echo
	@echo "Done. Look at:"
	@echo "  images    $(DEMO_DIR)/predictions/*/montage.png"
	@echo "  report    $(DEMO_DIR)/evaluation/report.html (metrics.json: the table above)"
	@echo "  curves    .venv/bin/tensorboard --logdir=$(DEMO_DIR)"

demo-model: venv  ## release the model of `make demo` as the bundled one, taskexpert_jax/demo_model
	@rm -rf .cache/demo_model
	@$(RUN) -m taskexpert_jax.release $(DEMO_DIR) --output=.cache/demo_model/demo --license=apache-2.0 \
		--note="The bundled model of TaskExpert-JAX, which \`make demo\` trains in minutes on two CPU cores."
	@rm -rf taskexpert_jax/demo_model
	@mv .cache/demo_model/demo taskexpert_jax/demo_model

demo-smoke:  ## a few steps of the demo, to see that it runs
	@rm -rf runs/demo-smoke
	@$(MAKE) --no-print-directory demo DEMO_CONFIG=configs/demo.py:tiny DEMO_DIR=runs/demo-smoke

test: venv  ## run the tests (TEST_ARGS=... goes to pytest)
	@$(VENV_PYTHON) -m pytest --numprocesses=$(TEST_PROCESSES) --dist=loadfile $(TEST_ARGS)

# timm without its dependencies for torchvision and downloads, which the tests do not use.
ci-needs: venv
	@$(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements-ci.txt -c requirements.lock
	@$(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps timm==1.0.31

parity: ci-needs  ## install PyTorch and timm, and compare the backbone with timm's
	@$(VENV_PYTHON) -m pytest tests/models/test_timm_parity.py

lint: venv  ## style and types: ruff, pyright
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/pyright --warnings

# The pages of the README, docs/ and the docstrings; a broken link or anchor fails. NO_MKDOCS_2_WARNING hides an
# advertisement. DOCS_REPOSITORY=URL makes links to source files lead to the repository.
docs: venv  ## build the documentation site: .cache/site/index.html
	@$(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt -c requirements.lock
	@NO_MKDOCS_2_WARNING=1 $(VENV_PYTHON) -m mkdocs build --strict --quiet
	@echo ".cache/site/index.html"

# LOCK_ARGS='--constraint requirements.lock' adds new packages and leaves the others as they are.
lock:  ## resolve requirements-dev.txt into requirements.lock (use the oldest supported Python)
	@rm -rf .cache/lock && $(PYTHON) -m venv .cache/lock
	@.cache/lock/bin/python -m pip install --quiet --upgrade setuptools --requirement requirements-dev.txt $(LOCK_ARGS)
	@{ head -n 1 requirements.lock; .cache/lock/bin/python -m pip freeze --all --exclude pip --exclude-editable; } \
		> .cache/new.lock
	@mv .cache/new.lock requirements.lock && rm -rf .cache/lock

format: venv  ## rewrite the code in the project's style
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

clean:  ## remove .venv, caches, build and runs/demo*, nothing else
	rm -rf .venv .cache .pytest_cache .ruff_cache .hypothesis build taskexpert_jax.egg-info runs/demo runs/demo-smoke
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
