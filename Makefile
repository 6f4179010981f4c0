# Everything runs in its own virtual environment; nothing is installed outside this folder.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
STAMP   = $(VENV)/.installed

.PHONY: demo test torture check format bench docs clean

demo: $(STAMP)-demo            ## everything on 200 real photos, into ./demo
	$(BIN)/builder demo --out demo

# Three processes on two cores: some tests wait for servers or processes.
test: $(STAMP)-test            ## all tests
	$(BIN)/python -m pytest -n 3 --dist loadfile

torture: $(STAMP)-test         ## kills at every write, link and rename; HOSTILE=DIR: and a folder of broken files; vLLM
	$(BIN)/python tests/torture.py $(if $(HOSTILE),--hostile $(HOSTILE))
	$(BIN)/python tests/torture_vllm.py

check: $(STAMP)-dev            ## format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 3 --dist loadfile

format: $(STAMP)-dev           ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)-test           ## every path next to its peers, into bench/results.json
	$(BIN)/python -m bench

docs: $(STAMP)-dev             ## write docs/cli.md and docs/columns.md again
	$(BIN)/python docs/generate.py

$(STAMP)-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --use-pep517 -e '.[$*]'
	@touch $@

$(BIN)/python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: builder needs Python 3.11 or newer, and '$(PYTHON)' is older or missing"; \
	    echo "  fix: install it (Debian: apt-get install python3 python3-venv) or name one: make demo PYTHON=python3.12"; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: this Python has no venv or no pip"; \
	    echo "  fix: apt-get install python3-venv python3-pip (Debian, Ubuntu) or dnf install python3-pip (Fedora)"; exit 1; }
	@"$(PYTHON)" -m venv $(VENV)

clean:
	rm -rf $(VENV) demo
