"""The pool of the GPU tasks, made by whoever may write to Airflow's database: the set-up and the scheduler.

Airflow leaves tasks of a missing pool waiting for ever without a word, and no task can look for its own pool, since
tasks have no access to the database. So the scheduler makes the pool when it starts (as a listener of the plugin).
"""

from __future__ import annotations

import logging
from typing import Any

from airflow.listeners import hookimpl

from blendserve.airflow import configuration

log = logging.getLogger(__name__)


def ensure_gpu_pool() -> None:
    """Make the pool `[blendserve] gpu_pool` with `gpu_pool_slots` slots, unless there is one of that name."""
    from airflow.models.pool import Pool

    name = configuration.get("gpu_pool")
    if Pool.get_pool(name) is not None:
        return
    slots = configuration.get_integer("gpu_pool_slots")
    log.info("pool %s was missing; it is made with %d slot(s)", name, slots)
    Pool.create_or_update_pool(
        name, slots=slots, description="One slot a GPU: the tasks that run BlendServe's engine.", include_deferred=False
    )


@hookimpl  # type: ignore[untyped-decorator]
def on_starting(component: Any) -> None:
    if getattr(component, "job_type", None) == "SchedulerJob":
        ensure_gpu_pool()
