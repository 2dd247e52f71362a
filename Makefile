VENV ?= .venv
PYTHON ?= python3
# Where the CPU build of PyTorch comes from if pip finds none among its own sources.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --no-deps --no-compile --disable-pip-version-check

.PHONY: setup serve test test-gpu check clean

setup: $(VENV)/installed

$(VENV)/installed: requirements-cpu.lock requirements-dev.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "focus-vllm needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	torch=$$(grep '^torch==' requirements-cpu.lock) && \
		{ $(INSTALL) "$$torch" 2>/dev/null || $(INSTALL) --index-url $(TORCH_INDEX) "$$torch"; }
	$(INSTALL) -r requirements-cpu.lock -r requirements-dev.lock
	$(INSTALL) --no-build-isolation -e .
	touch $@

serve: setup
	$(BIN)/focus-serve --port 8000

test: setup
	$(BIN)/pytest -m "not gpu and not two_gpus"

test-gpu:
	$(PYTHON) -m pytest -m gpu

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
