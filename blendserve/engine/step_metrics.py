"""What one engine step did, as a row of the shard's metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import pyarrow as pa
import pyarrow.compute as pc

from blendserve.schemas import STEP_METRICS


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """The columns of STEP_METRICS, in its order."""

    step: int
    started_seconds: float
    step_seconds: float
    num_prefill_tokens: int
    num_decode_tokens: int
    num_running: int
    num_running_left: int
    num_waiting: int
    num_used_blocks: int
    num_total_blocks: int
    num_cached_tokens: int
    num_preempted: int
    kv_read_bytes: int


def metrics_table(steps: Sequence[StepMetrics]) -> pa.Table:
    columns = {field.name: [getattr(step, field.name) for step in steps] for field in fields(StepMetrics)}
    return pa.table(columns, schema=STEP_METRICS)


def ended_seconds(metrics: pa.Table) -> float:
    """When the last step ended, in seconds since the first one began; 0 without steps."""
    ends = pc.add(metrics.column("started_seconds"), metrics.column("step_seconds"))
    return float(pc.max(ends).as_py() or 0.0)
