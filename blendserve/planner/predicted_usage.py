"""How the plan would use compute and memory over time, beside a depth-first order of the same requests.

The simulator replays one shard, so that this costs seconds however large the job is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from blendserve.planner.performance_model import Hardware, ModelShape
from blendserve.planner.plan_files import ScheduledRows
from blendserve.planner.schedule import CostModel, PlannedRequests, schedule_requests
from blendserve.planner.simulate import capacity_tokens, simulated_machine
from blendserve.planner.simulated_run import SimulatedJob, run_schedule
from blendserve.planner.simulation import SimulationResult
from blendserve.schemas import PREDICTED_USAGE
from blendserve.spec import Policy

_POLICIES: Final[tuple[Policy, ...]] = ("blend", "dfs")
_MAX_REQUESTS = 20_000


def predict_usage(
    requests: PlannedRequests,
    scheduled: ScheduledRows,
    shape: ModelShape,
    hardware: Hardware,
    costs: CostModel,
) -> pa.Table:
    """The relation `predicted_usage` of the first shard; empty where the model's weights leave no room for a cache.

    `requests` are those of the schedule, in sorted order.
    """
    if capacity_tokens(shape, hardware) < 1 or requests.num_requests == 0:
        return PREDICTED_USAGE.empty_table()
    machine = simulated_machine(shape, hardware, is_overlapped=hardware.name != "cpu")
    first_shard = np.sort(scheduled.schedule.positions[scheduled.shard_range(0)])[:_MAX_REQUESTS]
    job = _job_of(requests, first_shard)
    tables = []
    for policy in _POLICIES:
        schedule = schedule_requests(job.requests, policy=policy, seed=0, num_shards=1, costs=costs)
        (result,) = run_schedule(job, schedule, machine)
        tables.append(_table(policy, result, machine.capacity_tokens))
    return pa.concat_tables(tables)


def _job_of(requests: PlannedRequests, rows: NDArray[np.int64]) -> SimulatedJob:
    everyone = SimulatedJob(requests, np.zeros(0, np.int64))
    chosen = everyone.subset(rows, everyone.lengths)
    return replace(everyone, requests=chosen, output_tokens=np.rint(chosen.mean_output_tokens).astype(np.int64))


def _table(policy: Policy, result: SimulationResult, capacity_tokens: int) -> pa.Table:
    usage = result.usage
    count = len(usage.compute)
    columns = {
        "policy": np.repeat(policy, count),
        "started_seconds": np.arange(count) * usage.piece_seconds,
        "compute_share": usage.compute,
        "memory_share": usage.memory,
        "cache_share": usage.held_tokens / capacity_tokens,
    }
    return pa.table(columns, schema=PREDICTED_USAGE)
