# make install   the project, its extras and the tested versions of all packages into .venv (quick when nothing has changed)
# make test      the tests that a change needs: about sixteen minutes on two cores
# make test-all  every test, for a night
# make demo-encoder  hidden tokens and neighbours in source code, then its packages with many and few labels
# make demo-seq2seq  names of places from English into Ukrainian, by an encoder and a decoder
# make demo      prepare a corpus, train, stop, resume, validate, generate: minutes on two CPU cores
# make demo-finetune  a small chat model: text, answers by LoRA, preferences by DPO, exports, a page with all answers
# make demo-image  a perceptron, a CNN and a ViT on handwritten digits, with a page about their mistakes
# make lint      formatting, lint and types
# make docs      the pages as a site, into site/: index.html opens in a browser, nothing comes from a network
# make bench     install what the benchmarks compare with, too
#
# PYTHON=python3.12      another interpreter, 3.11 to 3.13
# TORCH=2.11.0           another torch than the tested one, in an environment of its own (.venv-torch-2.11.0)
# TORCH_BUILD=           PyPI's own build of torch (CUDA on Linux) on a machine without a GPU, such as a login node

PYTHON ?= python3
VENV := .venv$(if $(TORCH),-torch-$(TORCH))
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
TEST_TOOLS := $(VENV)/test-tools
CONSTRAINTS := $(VENV)/constraints.txt

# PyPI's torch for Linux brings gigabytes of CUDA packages; a machine without an NVIDIA driver takes the CPU build.
TORCH_PIN := torch==$(or $(TORCH),$(shell sed -n 's/^torch==//p' constraints.txt))
TORCH_BUILD ?= $(if $(shell command -v nvidia-smi),,$(if $(filter Linux,$(shell uname)),+cpu))
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: install test test-all demo demo-encoder demo-finetune demo-image demo-seq2seq lint docs bench

install: $(INSTALLED)

# Three files at a time, on two cores as well: half of the tests wait for processes most of the time. The long ones come
# first, in the order of testpaths.
test: $(TEST_TOOLS)
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder -m "not slow"

test-all: $(TEST_TOOLS)
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

demo: install
	PATH="$(CURDIR)/$(BIN):$$PATH" launch/demo.sh

demo-encoder: install
	PATH="$(CURDIR)/$(BIN):$$PATH" launch/demo_encoder.sh

demo-finetune: install
	PATH="$(CURDIR)/$(BIN):$$PATH" launch/demo_finetune.sh

demo-image: install
	$(BIN)/python -c 'import sklearn' 2>/dev/null || $(BIN)/pip install scikit-learn --constraint $(CONSTRAINTS)
	PATH="$(CURDIR)/$(BIN):$$PATH" launch/demo_image.sh

demo-seq2seq: install
	$(BIN)/python -c 'import pycountry' 2>/dev/null || $(BIN)/pip install pycountry --constraint $(CONSTRAINTS)
	PATH="$(CURDIR)/$(BIN):$$PATH" launch/demo_seq2seq.sh

lint: $(TEST_TOOLS)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(INSTALLED)
	@$(BIN)/python -c 'import mkdocs' 2>/dev/null || $(BIN)/pip install --editable '.[all,docs]' --constraint $(CONSTRAINTS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: install
	$(BIN)/pip install '.[bench]' --constraint $(CONSTRAINTS)
	$(BIN)/pip install --no-deps --constraint $(CONSTRAINTS) litdata
	$(BIN)/pip install --no-deps --editable .

# torch first: pip must not choose its build while it resolves the rest. The configured indexes may have the CPU build
# already; otherwise it comes from PyTorch's own. Another torch may want another setuptools (2.11 an older one).
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "$(PYTHON) is no Python 3.11, 3.12 or 3.13 ($$($(PYTHON) --version 2>&1 | head -n 1)); make install PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' \
	  || { echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "1 of 2: $(TORCH_PIN)$(TORCH_BUILD) into $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install "$(TORCH_PIN)$(TORCH_BUILD)" || { echo "not there: asking $(TORCH_INDEX)"; \
	  $(BIN)/pip install "$(TORCH_PIN)$(TORCH_BUILD)" --extra-index-url $(TORCH_INDEX); } \
	  || { echo "no $(TORCH_PIN)$(TORCH_BUILD) to be had; 'make install TORCH_BUILD=' takes PyPI's build" >&2; exit 1; }
	@echo "2 of 2: bigtrain and the other packages: a minute or two"
	@sed -e 's/^torch==.*/$(TORCH_PIN)/' $(if $(TORCH),-e '/^setuptools==/d') constraints.txt >$(CONSTRAINTS)
	@$(BIN)/pip install --editable '.[all]' --constraint $(CONSTRAINTS)
	@touch $@

$(TEST_TOOLS): $(INSTALLED)
	@echo "the tools of the tests"
	@$(BIN)/pip install --editable '.[all,test]' --constraint $(CONSTRAINTS)
	@touch $@
