# Everything a newcomer needs: `make demo` and `make test`. Both set up their own environment.
# PIP_ARGS reaches pip, for example PIP_ARGS="--find-links DIR" for a CPU wheel of torch.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
JOBS ?= 2
SITE = $(wildcard $(VENV)/lib/python3*/site-packages)
SEALED_LIBRARIES := numpy onnxruntime tokenizers llguidance rdkit gemmi
INSTALL := $(PIP) install --no-compile --quiet -c constraints.txt --build-constraint constraints.txt $(PIP_ARGS)

.PHONY: demo test test-tools wheel-test lint bench soak smoke-train clean

$(VENV)/.pip: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt --upgrade pip
	touch $@

# Compiled once: a sealed start can write nothing and would compile these each time.
$(VENV)/.run: $(VENV)/.pip pyproject.toml
	$(INSTALL) -e '.[cpu,science,staging]'
	$(BIN)/python -m compileall -q -j 2 $(addprefix $(SITE)/,$(SEALED_LIBRARIES))
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(INSTALL) -e '.[cpu,science,staging,hsm]' --group dev
	touch $@

demo: $(VENV)/.run
	$(BIN)/airgap demo --out demo-out

test: $(VENV)/.dev
	$(BIN)/coverage erase
	$(BIN)/pytest -m 'not soak' -n $(JOBS) --dist loadfile --no-loadscope-reorder --cov --cov-report=
	$(BIN)/coverage report
	for package in policy bundle airgap; do \
	    echo "$$package: at least 90 % of lines"; \
	    $(BIN)/coverage report --include="$$package/*" --fail-under=90 --format=total || exit 1; \
	done

# Debian packages that some tests compare with (OpenSSL, SoftHSM, systemd and others); without one
# its tests are skipped and say so.
test-tools:
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
	    $$(cat tests/apt-packages.txt)

# The wheel alone: a lab with [cpu,science], an auditor with no extra at all. Then the installer, on a
# bare Debian root without a network, and the units under a systemd of that root's own; these two are
# skipped, and say so, without root, debootstrap or namespaces.
wheel-test: $(VENV)/.run
	test -f demo-out/audit-export/manifest.json || $(BIN)/airgap demo --out demo-out
	$(BIN)/python tests/bare_wheel.py --demo demo-out --work build/wheel
	rm -rf build/medium
	$(BIN)/python tests/clean_root.py --demo demo-out --work build/clean-root --medium build/medium || test $$? = 77
	$(BIN)/python tests/live_systemd.py --demo demo-out --work build/live-systemd --medium build/medium || test $$? = 77

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry .
	$(BIN)/codespell

bench: $(VENV)/.dev
	test -e demo-out/lab/store/current || $(BIN)/airgap demo --out demo-out
	$(BIN)/python benchmarks/run.py

soak: $(VENV)/.dev
	$(BIN)/pytest -m soak

smoke-train: $(VENV)/.dev
	$(BIN)/python reference/logos-ref-tiny/recipe.py smoke --out build/smoke

clean:
	rm -rf $(VENV) demo-out build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage .coverage.*
