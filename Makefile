# Every target works as the very first command on a fresh clone: what it needs, it makes.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TABLES := $(addprefix table,1 2 3 4 5 6 7 8 9 10)

.DEFAULT_GOAL := help
.PHONY: help env demo test dry campaign lint clean figures self_adaptive_memory results $(TABLES)

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9_]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(STAMP) ## create .venv and install the project (uv if there is one, else venv and pip)

$(STAMP): pyproject.toml
	@echo "installing into $(VENV): PyTorch takes up to 7 GB ($$(df -Ph . | awk 'NR==2 {print $$4}') free here) and minutes the first time"
	@if command -v uv >/dev/null 2>&1; then \
	  uv venv --quiet --allow-existing --python $(PYTHON) $(VENV) && \
	  uv pip install --python $(BIN)/python -e '.[dev]'; \
	else \
	  $(PYTHON) -m venv $(VENV) && \
	  $(BIN)/python -m pip install --disable-pip-version-check -q -e '.[dev]'; \
	fi
	@touch $@

demo: $(STAMP) ## even and odd digits by three methods: hidden modes, students, a sentence, runs/demo/report.html
	@echo "even and odd digits, 5 images of each: random real ones, plain samples, MGD3's"
	@$(BIN)/python run.py experiment=demo $(ARGS)
	@$(BIN)/python scripts/report.py folder=runs/demo by=guidance.stop_t

test: $(STAMP) ## the test suite (CPU even beside a GPU, no network), two modules at a time
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

dry: $(STAMP) ## where a GPU would wait and what would be copied, counted without one; ARGS="hard_label decoding"
	@PYTHONPATH=tests $(BIN)/python -m dry $(ARGS)

campaign: $(STAMP) ## hundreds of kills, signals, races and bad inputs; 8 minutes on 2 cores
	@PYTHONPATH=tests $(BIN)/python -m campaign $(ARGS)

lint: $(STAMP) ## ruff (format and rules) and mypy
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

$(TABLES): $(STAMP)
	@$(BIN)/python scripts/reproduce.py table=$(@:table%=%) $(ARGS)

table1: ## a table of the paper, 1 to 10; ARGS="plan=true", "rehearsal=true", "only.ipc=10 compute.batch_size=auto"

self_adaptive_memory: $(STAMP) ## the second paper's tables 1 to 3 and figures 3 and 4; ARGS as above
	@for n in table=S/1 table=S/2 table=S/3 figure=S/3 figure=S/4; do \
	  $(BIN)/python scripts/reproduce.py $$(echo $$n | sed s,S/,$@/,) $(ARGS) || failed=1; done; test -z "$$failed"

results: $(STAMP) ## everything on digits that results/ shows, again: hours
	@PYTHON=$(BIN)/python sh scripts/digits.sh

figures: $(STAMP) ## the paper's figures 4 to 11, one after another; ARGS as above
	@for n in 4 5 6 7 8 9 10 11; do $(BIN)/python scripts/reproduce.py figure=$$n $(ARGS) || failed=1; done; test -z "$$failed"

clean: ## remove the environment and caches, keep runs/
	rm -rf $(VENV) cache .pytest_cache .mypy_cache .ruff_cache
