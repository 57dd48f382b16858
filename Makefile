# Every target builds .venv when it is missing or when pyproject.toml or constraints.txt changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
export JUPYTER_PREFER_ENV_PATH := 1
export IMAGES SEEDS STEPS SMALL

# Shapes and types are checked at every call of these; all of diva_lab, `make test TYPED=diva_lab`, takes longer.
TYPED ?= diva_lab.models,diva_lab.objectives,diva_lab.analysis,diva_lab.gradients
NBVAL := -p no:python -p tests.own_runs --nbval-lax --nbval-current-env --nbval-cell-timeout=300
# Finished runs are not repeated: with an empty folder of runs the notebooks train again.
FRESH = export DIVA_LAB_RUNS=$$(mktemp -d) && trap 'rm -rf "$$DIVA_LAB_RUNS" notebooks/live.ipynb' EXIT
NBSTRIPOUT := --keep-output --keep-count --keep-id --extra-keys \
    "metadata.papermill cell.metadata.papermill metadata.widgets metadata.language_info.version"
SITE := python -m sphinx -q -W --keep-going -c docs -d build/doctrees .

.DEFAULT_GOAL := help
.PHONY: help run test lab site figures pretrain study gpu-check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

run: $(INSTALLED) ## run all notebooks; writes runs/ID/report.html and summary.csv [IMAGES=folder_or_tars SEEDS=3 STEPS=n]
	@$(BIN)/diva-lab run \
	    $${IMAGES:+--images "$$IMAGES"} $${SEEDS:+--seeds "$$SEEDS"} $${STEPS:+--steps "$$STEPS"}

test: export HF_HUB_OFFLINE := 1
test: export DIVA_LAB_FAST := 1
test: export OMP_NUM_THREADS := 1
test: $(INSTALLED) ## lint, run all tests, then all notebooks; lists skipped tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadfile --jaxtyping-packages=$(TYPED),beartype.beartype
	$(FRESH) && $(BIN)/python -m pytest -n 2 --dist loadscope $(NBVAL) notebooks

lab: $(INSTALLED) ## open the notebooks in JupyterLab [ARGS=...]
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/notebooks \
	    --ContentsManager.pre_save_hook=diva_lab.workbook.display.drop_python_version $(ARGS)

site: $(INSTALLED) ## build the notebooks and docs/ as a static site, build/site
	$(BIN)/$(SITE) build/site

figures: $(INSTALLED) ## run the notebooks in place; rewrites their outputs and figures/
	@$(FRESH); set -e; for notebook in notebooks/[0-9][0-9]_*.ipynb; do \
	    sed 's/save_figures = False/save_figures = True/' $$notebook >notebooks/live.ipynb; \
	    $(BIN)/jupyter nbconvert --to notebook --execute --inplace notebooks/live.ipynb; \
	    $(BIN)/nbstripout $(NBSTRIPOUT) notebooks/live.ipynb; \
	    sed 's/save_figures = True/save_figures = False/' notebooks/live.ipynb >$$notebook; \
	done

pretrain: $(INSTALLED) ## train data/tiny again from a seed: hours on two cores, continues where it was stopped
	$(BIN)/python -m tools.pretrain all --threads $$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
	$(BIN)/python -m tools.language
	$(BIN)/python -m tools.rivals --threads $$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)

study: $(INSTALLED) ## run the study in two worlds, write data/results: hours, continues where it was stopped [SMALL=1: minutes]
	$(BIN)/python -m tools.study $${SMALL:+--small}
	$(BIN)/python -m tools.tables $${SMALL:+--small}
	$(BIN)/python -m tools.feedback all $${SMALL:+--small}
	@test -n "$$SMALL" || { set -ex; test -e runs/world-1/diffusion/record.json || \
	    $(BIN)/python -m tools.pretrain models --world 1 --out runs/world-1; \
	    $(BIN)/python -m tools.study --models runs/world-1; \
	    $(BIN)/python -m tools.tables --models runs/world-1; }

gpu-check: $(INSTALLED) ## on a GPU, 25 minutes: its tests, a step at real size, evaluation; records and a page [OUT=out/gpu]
	@$(BIN)/python -m tools.gpu_check $(OUT)

clean: ## remove .venv and caches, but not runs/
	rm -rf $(VENV) *.egg-info build dist .pytest_cache .ruff_cache
	find diva_lab tools tests notebooks \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or newer," \
	    "or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $$($(PYTHON) --version) is too" \
	    "old; Python 3.11 or newer is needed, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@{ test -f $@ && $(BIN)/python -m pip --version >/dev/null 2>&1; } || $(PYTHON) -m venv --clear $(VENV)  # a stopped install starts again
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev,site]"
	@touch $@
