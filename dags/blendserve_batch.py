"""### Run a batch of prompts

Reads rows from Parquet, makes a prompt of each, runs them through a model and writes the rows back with their
completions. Trigger it and fill in the form; the fields in closed sections have good defaults.

What comes out: `results/*.parquet` in the output folder, `manifest.json` with the counts, and a report. A run that
was stopped or failed goes on where it was when you clear its failed tasks, or trigger again with the same output.
"""

from __future__ import annotations

from airflow.sdk import DAG, Asset

from blendserve.airflow import BlendServeBatch, form_params

with DAG(
    dag_id="blendserve_batch",
    dag_display_name="BlendServe: run a batch",
    doc_md=__doc__,
    schedule=None,
    params=form_params(),
    max_active_runs=4,
    tags=["blendserve"],
):
    BlendServeBatch(group_id="batch", use_params=True, results_asset=Asset("blendserve_results"))
