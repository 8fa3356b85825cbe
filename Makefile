# Two commands matter: `make demo` and `make test`. Both need Python 3.11 or later, nothing else.
PYTHON ?= python3
VENV := .venv
READERS := .venv-exports
HARNESS := .venv-eval
BIN := $(VENV)/bin
PIP := pip install --quiet --disable-pip-version-check -c constraints.txt
INSTALL := $(BIN)/$(PIP)
LLAMA_CPP := -DLLAVA_BUILD=OFF $(patsubst %,-DLLAMA_BUILD_%=OFF,TESTS TOOLS EXAMPLES SERVER)

.PHONY: demo test lint slow test-exports test-eval clean

demo: $(VENV)/.installed
	$(BIN)/anyrank demo

test: $(VENV)/.installed-test lint
	$(BIN)/pytest

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

slow: $(VENV)/.installed-test
	$(BIN)/pytest -m slow

# What runs the exports, each with its own reader. The import fails where a test would only skip.
test-exports: $(READERS)/.installed
	$(READERS)/bin/python -c 'import gguf, hqq, llama_cpp, mlx.core, mlx_lm, torchao'
	$(READERS)/bin/pytest -m slow tests/export

# Standard tasks through lm-eval, whose 40 packages (350 MB) the other tests can do without.
test-eval: $(HARNESS)/.installed
	$(HARNESS)/bin/python -c 'import lm_eval'
	$(HARNESS)/bin/pytest tests/sweep

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "anyrank needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[nf4]'
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(INSTALL) -e '.[nf4,test]'
	touch $@

# An environment of its own: Transformers imports hqq and torchao wherever it finds them, and slows down.
# llama.cpp is built from source, without tools (4 to 12 minutes); hqq without its CUDA kernels.
$(READERS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(READERS)
	DISABLE_CUDA=1 CMAKE_ARGS="$(LLAMA_CPP)" $(READERS)/bin/$(PIP) -e '.[nf4,test-exports]'
	touch $@

$(HARNESS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(HARNESS)
	$(HARNESS)/bin/$(PIP) -e '.[nf4,eval,test]'
	touch $@

clean:
	rm -rf $(VENV) $(READERS) $(HARNESS) demo-run
