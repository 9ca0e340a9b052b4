"""The page behind a run's report tab: how far the shards of the run's job are while it runs, then its report.

A run with several jobs has a page that leads to those of each.

Whoever may read the DAG in Airflow may read its reports, nobody else. Reports hold text that came from data, so the
browser is told to treat them as a foreign page that may draw but neither send nor read anything of Airflow's.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from airflow.api_fastapi.core_api.security import requires_access_dag
from airflow.models.task_state_store import TaskStateStoreModel
from airflow.models.taskinstance import TaskInstance
from airflow.models.xcom import XComModel
from airflow.utils.session import create_session
from airflow.utils.state import State
from fastapi import Depends, FastAPI, Response
from sqlalchemy import select

from blendserve.airflow.base import PROGRESS_KEY
from blendserve.airflow.operators import RUN_FOLDER_KEY
from blendserve.file_store import open_store
from blendserve.job_folder import JobFolder
from blendserve.working_copy import is_url

_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
REPORT_HEADERS = {
    **_HEADERS,
    "Content-Security-Policy": "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data: blob:; font-src data:; frame-ancestors 'self'",
}
# Without a sandbox: a page in one may not send Airflow's cookie along when it reloads itself.
PROGRESS_HEADERS = {**_HEADERS, "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="5"><title>BlendServe</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: .3rem 1rem .3rem 0; text-align: right; }}
</style></head><body>{body}</body></html>
"""

app = FastAPI(title="BlendServe reports", docs_url=None, redoc_url=None, openapi_url=None)


@app.get(
    "/dags/{dag_id}/report",
    response_class=Response,
    dependencies=[Depends(requires_access_dag(method="GET"))],
)
def report(dag_id: str, run_id: str, group: str | None = None) -> Response:
    """The state of the job's shards until its report is written, then the report.

    `group`: which job of several, as the start of its tasks' ids.
    """
    jobs = _jobs(dag_id, run_id)
    if group is None and len(jobs) == 1:
        (group,) = jobs
    if group is None or group not in jobs:
        return _own_page(_links(run_id, list(jobs)))
    if _is_going_on(dag_id, run_id, group):
        return _own_page(_progress_table(_progress(dag_id, run_id, group)))
    page = _read_report(jobs[group])
    if page is None:
        return _own_page("<p>The job ended before its report. The log of its red task says why.</p>")
    return Response(page, media_type="text/html", headers=REPORT_HEADERS)


def _own_page(body: str) -> Response:
    return Response(PAGE.format(body=body), media_type="text/html", headers=PROGRESS_HEADERS)


def _links(run_id: str, groups: list[str]) -> str:
    if not groups:
        return "<p>This run has started no BlendServe job.</p>"
    queries = [(group, urlencode({"run_id": run_id, "group": group})) for group in groups]
    links = "".join(f'<li><a href="?{escape(query)}">{escape(group.rstrip("."))}</a></li>' for group, query in queries)
    return f"<h1>Jobs of this run</h1><ul>{links}</ul>"


def _read_report(place: str) -> bytes | None:
    """The report of the job at a path or URL: a place in an XCom alone opens no other file."""
    if not is_url(place) and JobFolder(Path(place)).report.is_symlink():
        return None
    store = open_store(place)
    return store.read("report.html") if store.read("job.json") is not None else None


def _jobs(dag_id: str, run_id: str) -> dict[str, str]:
    """The folder, or URL, of each of the run's jobs, by what its tasks' ids start with; in the order of their begin."""
    query = XComModel.get_many(run_id=run_id, dag_ids=dag_id, key=RUN_FOLDER_KEY)
    with create_session() as session:
        found = sorted(session.scalars(query), key=lambda entry: entry.timestamp)
        return {_group(entry.task_id): str(XComModel.deserialize_value(entry)) for entry in found}


def _group(task_id: str) -> str:
    """What the ids of all tasks in the group of this task start with."""
    return "".join(task_id.rpartition(".")[:2])


def _is_going_on(dag_id: str, run_id: str, group: str) -> bool:
    """Whether the job's shards or its report are still to come, be it again."""
    query = select(TaskInstance.state).where(
        TaskInstance.dag_id == dag_id,
        TaskInstance.run_id == run_id,
        TaskInstance.task_id.startswith(group, autoescape=True),
        TaskInstance.operator.in_(("SampleOperator", "RunShardOperator", "ReportOperator")),
    )
    with create_session() as session:
        return any(state not in State.finished for state in session.scalars(query))


def _progress(dag_id: str, run_id: str, group: str) -> list[dict[str, Any]]:
    """What the job's tasks last wrote about their shards."""
    query = (
        select(TaskStateStoreModel.value)
        .where(
            TaskStateStoreModel.dag_id == dag_id,
            TaskStateStoreModel.run_id == run_id,
            TaskStateStoreModel.task_id.startswith(group, autoescape=True),
            TaskStateStoreModel.key == PROGRESS_KEY,
        )
        .order_by(TaskStateStoreModel.task_id, TaskStateStoreModel.map_index)
    )
    with create_session() as session:
        return [json.loads(value) for value in session.scalars(query)]


def _progress_table(shards: list[dict[str, Any]]) -> str:
    if not shards:
        return "<p>No shard is running yet. The report appears here when the run is done.</p>"
    rows = "".join(_progress_row(shard) for shard in shards)
    return (
        "<h1>Running</h1><table><tr><th>Shard</th><th>Requests done</th><th>Running now</th><th>Tokens/s</th>"
        f"<th>Density now</th><th>Time left</th></tr>{rows}</table><p>The report appears here when the run is done.</p>"
    )


def _progress_row(shard: dict[str, Any]) -> str:
    done, total = shard["done"], shard["total"]
    seconds_left = shard["seconds"] / done * (total - done) if done else None
    cells = (
        shard["shard"],
        f"{done} of {total}",
        shard["num_running"],
        shard["tokens_per_second"],
        "" if shard.get("density") is None else shard["density"],
        "" if seconds_left is None else f"{seconds_left / 60:.1f} min",
    )
    return "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>"
