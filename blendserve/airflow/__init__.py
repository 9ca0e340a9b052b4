"""BlendServe in Airflow: a task group and operators for your own DAGs.

    from blendserve.airflow import BlendServeBatch

Importing this package costs nothing: what a name needs is imported when the name is first used, and torch, DuckDB,
pyarrow and transformers only when a task executes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blendserve.airflow.form import form_params
    from blendserve.airflow.operators import (
        AnalyzeOperator,
        ExtractOperator,
        GateOperator,
        MergeOperator,
        PlanOperator,
        PreflightOperator,
        ReportOperator,
        RunShardOperator,
        SampleOperator,
        TokenizeOperator,
    )
    from blendserve.airflow.task_group import BlendServeBatch, BlendServePlan

__all__ = [
    "AnalyzeOperator",
    "BlendServeBatch",
    "BlendServePlan",
    "ExtractOperator",
    "GateOperator",
    "MergeOperator",
    "PlanOperator",
    "PreflightOperator",
    "ReportOperator",
    "RunShardOperator",
    "SampleOperator",
    "TokenizeOperator",
    "form_params",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = {"BlendServeBatch": "task_group", "BlendServePlan": "task_group", "form_params": "form"}
    return getattr(import_module(f"{__name__}.{module.get(name, 'operators')}"), name)
