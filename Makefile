# One line per target. Variables: RECIPE=recipes/my.yaml  RUN=outputs/my/2026-…  ARGS="--set training.epochs=1"
# of diff: A=outputs/my/2026-…  B=outputs/my/2026-…
# of export: TO=mlx
# of quick: MODEL=Qwen/Qwen2.5-0.5B-Instruct  DATA=my_rows.jsonl
PYTHON ?= python3
RECIPE ?= recipes/smollm2_sql.yaml
RUN ?=
TO ?= mlx
A ?=
B ?=
ARGS ?=
PY := .venv/bin/python
INSTALL := .venv/bin/pip install --disable-pip-version-check
VERIFIED := --require-hashes --no-deps
LOCK := .venv/bin/uv pip compile --quiet --upgrade
MODEL ?= embedded/smollm2-135m-instruct
DATA ?= data/text_to_sql/train.jsonl
NEW_RECIPE = outputs/recipes/$(notdir $(MODEL))_$(subst /,_,$(basename $(DATA))).yaml
RUN_OPTION := $(if $(RUN),--run $(RUN))
.PHONY: setup setup-dev demo quick test lint train validate preview prepare baseline infer merge export evaluate resume reproduce diff data reference bench soak lock clean help

help:  ## show these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
setup: .venv/.installed  ## create .venv with the pinned requirements and the embedded model
setup-dev: .venv/.installed-dev  ## the same with what tests need
.venv/.python: ; @$(PYTHON) -c 'import sys; sys.exit("Tunebook needs Python 3.11 or newer; try: make PYTHON=python3.12") if sys.version_info < (3, 11) else 0' && $(PYTHON) -m venv .venv && touch $@
.venv/.installed: .venv/.python requirements.txt requirements.lock requirements-embedded.txt ; $(INSTALL) $(VERIFIED) -r requirements.lock -r requirements-embedded.txt && $(INSTALL) -c constraints.txt -r requirements.txt && touch $@
.venv/.installed-dev: .venv/.installed requirements-dev.txt requirements-dev.lock ; $(INSTALL) $(VERIFIED) -r requirements-dev.lock && $(INSTALL) -c constraints.txt -r requirements-dev.txt && touch $@
demo: setup  ## baseline, training, evaluation and report of the text-to-SQL task
	@$(PY) scripts/baseline_inference.py --recipe recipes/smollm2_sql.yaml && $(PY) scripts/train.py --recipe recipes/smollm2_sql.yaml && $(PY) scripts/evaluate_run.py
quick: setup $(NEW_RECIPE)  ## a new recipe for MODEL and DATA (kept if it is there already), then training
	@$(PY) scripts/train.py --recipe $(NEW_RECIPE) $(ARGS)
$(NEW_RECIPE): | setup ; @$(PY) scripts/new_recipe.py --model $(MODEL) --data $(DATA) --out $@
test: setup-dev  ## all tests
	@$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder
lint: setup-dev  ## style, types and architecture
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy && $(PY) -m pytest tests/test_architecture.py
train: setup  ## train RECIPE
	@$(PY) scripts/train.py --recipe $(RECIPE) $(ARGS)
resume: setup  ## go on with the latest run, or RUN, that was ended: killed, stopped, out of disk space
	@$(PY) scripts/train.py --resume $(RUN)
validate: setup  ## check RECIPE without loading weights
	@$(PY) scripts/validate.py --recipe $(RECIPE) $(ARGS)
preview: setup  ## rows of RECIPE as the model sees them, and their statistics
	@$(PY) scripts/preview_data.py --recipe $(RECIPE) $(ARGS)
prepare: setup  ## convert, split and deduplicate rows: ARGS="--in my.csv --out data/mine.jsonl --to messages"
	@$(PY) scripts/prepare_data.py $(ARGS)
baseline: setup  ## answers of the untouched model of RECIPE
	@$(PY) scripts/baseline_inference.py --recipe $(RECIPE) $(ARGS)
infer: setup  ## talk to the latest run, or to RUN
	@$(PY) scripts/infer.py $(RUN_OPTION) $(ARGS)
merge: setup  ## merge the latest run, or RUN
	@$(PY) scripts/merge.py $(RUN_OPTION) $(ARGS)
export: setup  ## the adapter of the latest run, or of RUN, in another tool's format: TO=mlx or TO=peft
	@$(PY) scripts/export.py --to $(TO) $(RUN_OPTION) $(ARGS)
evaluate: setup  ## before/after report of the latest run, or of RUN
	@$(PY) scripts/evaluate_run.py $(RUN_OPTION) $(ARGS)
reproduce: setup  ## take the first steps of the latest run, or of RUN, again and compare
	@$(PY) scripts/reproduce.py $(RUN_OPTION) $(ARGS)
diff: setup  ## what differs between two runs: A=outputs/my/2026-… B=outputs/my/2026-…
	@$(PY) scripts/diff_runs.py $(A) $(B) $(ARGS)
data: setup  ## generate the shipped rows anew
	@$(PY) data/text_to_sql/generate.py && $(PY) data/text_to_sql/generate_preference.py && $(PY) data/notes/generate.py
reference: setup  ## write docs/recipe_reference.md and the JSON Schema anew
	@$(PY) scripts/write_reference.py
bench: setup  ## speed beside other tools, in environments of their own under .bench/: ARGS="--work medium --rounds 1"
	@$(PY) benchmarks/speed.py --write $(ARGS)
lock: setup-dev  ## pin everything anew, with hashes, after a change of requirements*.txt
	@$(LOCK) requirements-dev.txt -o constraints.txt && $(LOCK) --generate-hashes --no-emit-package torch -c constraints.txt requirements.txt -o requirements.lock && $(LOCK) --generate-hashes --no-emit-package torch -c constraints.txt requirements-dev.txt -o requirements-dev.lock
soak: setup  ## kill real runs at 200 random moments, let them go on, compare the final weights: ARGS="--kills 20 --seed 1"
	@$(PY) benchmarks/soak.py $(ARGS)
clean:  ## remove .venv and caches; runs in outputs/ stay
	@rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis && find . -name __pycache__ -type d -prune -exec rm -rf {} +
