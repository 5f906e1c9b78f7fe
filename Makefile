# Each target makes its own .venv if there is none. Needed beforehand: Python 3.10 or newer, make, a package index.
#
#   make demo       train nothing, compile a trained network to INT8 and prove it
#   make test       everything a change must pass, linters apart
#   make test-all   the same with every registered network, in every precision (about an hour)
#   make lint       formatting, style, types
#   make docs       the documents as a site, in build/site
#   make bench      the figures of the README
#   make timm-families  67 networks of timm, beside the public tools (hours)
#
# A CPU-only PyTorch saves gigabytes: make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
# Processes of the tests. Each of the large networks of test-all takes up to 9 GB: make test-all WORKERS=1 where that is all.
WORKERS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)

.PHONY: demo test test-all lint docs bench timm-families clean

demo: $(VENV)/.demo
	$(BIN)/python examples/digits/demo.py

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet -n $(WORKERS)

test-all: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet -n $(WORKERS) -m ""

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documents link to other files of the repository: the site is made of them as they lie there.
SITE := build/site-source
docs: $(VENV)/.docs
	rm -rf $(SITE) build/site
	mkdir -p $(SITE)
	cp -r README.md ARCHITECTURE.md CONTRIBUTING.md CHANGELOG.md docs examples benchmarks $(SITE)
	find $(SITE) -name __pycache__ -prune -exec rm -r {} +
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet # the notice on a version that is not used
	@echo "Open build/site/README.html"

# The public pipeline that `bench` compares with needs an environment of its own: its packages conflict with ours.
bench: $(VENV)/.dev $(VENV)-public/.done
	$(BIN)/python benchmarks/run.py

timm-families: $(VENV)-timm/.done $(VENV)-public/.done
	OMP_NUM_THREADS=1 $(VENV)-timm/bin/python benchmarks/timm_families.py --markdown benchmarks/timm_families.md

# timm brings torchvision, which is bound to one version of torch.
$(VENV)-timm/.done: benchmarks/timm-requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)-timm
	$(VENV)-timm/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -e '.[compile]' -r $<
	@touch $@

$(VENV)-public/.done: benchmarks/public-requirements.txt
	$(PYTHON) -m venv $(VENV)-public
	$(VENV)-public/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r $<
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-public $(VENV)-timm build out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.demo: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (about two minutes the first time) ..."
	$(PIP) -e '.[compile,tensorrt-rtx,examples]'
	@touch $@

$(VENV)/.dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (about two minutes the first time) ..."
	$(PIP) -e '.[compile,tensorrt-rtx,examples,dev]'
	@touch $@

$(VENV)/.docs: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[docs]'
	@touch $@
