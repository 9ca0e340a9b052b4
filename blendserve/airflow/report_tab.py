"""The page behind a run's report tab: the report of the run's job, or how far its shards are while it runs.

Whoever may read the DAG in Airflow may read its reports, nobody else. Reports hold text that came from data, so the
browser is told to treat them as a foreign page that may draw but neither send nor read anything of Airflow's.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from airflow.api_fastapi.core_api.security import requires_access_dag
from airflow.models.task_state_store import TaskStateStoreModel
from airflow.models.xcom import XComModel
from airflow.utils.session import create_session
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
def report(dag_id: str, run_id: str) -> Response:
    """The HTML report of the run, or the state of its shards as long as there is none."""
    places = _job_folders(dag_id, run_id)
    pages = [page for page in map(_read_report, places) if page is not None]
    if pages:
        return Response(pages[-1], media_type="text/html", headers=REPORT_HEADERS)
    body = _progress_table(_progress(dag_id, run_id)) if places else "<p>This run has started no BlendServe job.</p>"
    return Response(PAGE.format(body=body), media_type="text/html", headers=PROGRESS_HEADERS)


def _read_report(place: str) -> bytes | None:
    """The report of the job at a path or URL: a place in an XCom alone opens no other file."""
    if not is_url(place) and JobFolder(Path(place)).report.is_symlink():
        return None
    store = open_store(place)
    return store.read("report.html") if store.read("job.json") is not None else None


def _job_folders(dag_id: str, run_id: str) -> list[str]:
    """The folders, or URLs, of the run's jobs, the latest last."""
    query = XComModel.get_many(run_id=run_id, dag_ids=dag_id, key=RUN_FOLDER_KEY)
    with create_session() as session:
        found = sorted(session.scalars(query), key=lambda entry: entry.timestamp)
        return [str(XComModel.deserialize_value(entry)) for entry in found]


def _progress(dag_id: str, run_id: str) -> list[dict[str, Any]]:
    """What the run's tasks last wrote about their shards."""
    query = (
        select(TaskStateStoreModel.value)
        .where(
            TaskStateStoreModel.dag_id == dag_id,
            TaskStateStoreModel.run_id == run_id,
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
