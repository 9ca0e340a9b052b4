"""### Preview a batch

Reads, tokenizes and plans like *BlendServe: run a batch*, then stops. The tab *BlendServe report* of the run says how
much of the prompts is shared, how dense the order is and how long the run would take. It needs no GPU.
"""

from __future__ import annotations

from airflow.sdk import DAG

from blendserve.airflow import BlendServePlan, form_params

with DAG(
    dag_id="blendserve_plan_only",
    dag_display_name="BlendServe: preview a batch",
    doc_md=__doc__,
    schedule=None,
    params=form_params(),
    tags=["blendserve"],
):
    BlendServePlan(group_id="preview", use_params=True)
