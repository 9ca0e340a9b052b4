"""What BlendServe adds to Airflow's own parts: a tab with the report of a run, and the GPU pool.

Every Airflow process loads this, so the web page behind the tab is imported by the first request for it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from airflow.plugins_manager import AirflowPlugin

from blendserve.airflow import gpu_pool

URL_PREFIX = "/blendserve"


async def report_app(
    scope: MutableMapping[str, Any],
    receive: Callable[[], Awaitable[Any]],
    send: Callable[[Any], Awaitable[None]],
) -> None:
    """The ASGI application of `report_tab`."""
    from blendserve.airflow.report_tab import app

    await app(scope, receive, send)


class BlendServePlugin(AirflowPlugin):  # type: ignore[misc]
    name = "blendserve"
    fastapi_apps = [{"app": report_app, "url_prefix": URL_PREFIX, "name": "BlendServe"}]  # noqa: RUF012 - Airflow's way
    external_views = [  # noqa: RUF012
        {
            "name": "BlendServe report",
            "href": f"{URL_PREFIX}/dags/{{DAG_ID}}/report?run_id={{RUN_ID}}",
            "destination": "dag_run",
            "url_route": "blendserve_report",
        }
    ]
    listeners = [gpu_pool]  # noqa: RUF012
