"""How each policy would use compute and memory over the whole job, on one device.

The simulator replays all requests of a job of up to 10,000, else one run of neighbours in every few, so that this costs
seconds however large the job is.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from blendserve.planner.schedule import CostModel, PlannedRequests, schedule_requests
from blendserve.planner.simulate import POLICIES
from blendserve.planner.simulated_job import SimulatedJob
from blendserve.planner.simulated_run import run_schedule
from blendserve.planner.simulation import SimulatedMachine, SimulationResult
from blendserve.schemas import PREDICTED_USAGE
from blendserve.spec import Policy

_MAX_REQUESTS: Final = 10_000
_NEIGHBOURS: Final = 32  # requests that are kept together, so that they share what they shared
_MAX_PIECES: Final = 256  # of a policy


def predict_usage(requests: PlannedRequests, machine: SimulatedMachine, costs: CostModel) -> pa.Table:
    """The relation `predicted_usage` of one machine.

    `requests`, one at least, are all that have to run, in sorted order. Where one in k is replayed, a second stands for
    k of them: but for the last outputs, which take k times as long on that axis as they do.
    """
    every = -(-requests.num_requests // _MAX_REQUESTS)
    rows = np.flatnonzero(np.arange(requests.num_requests) // _NEIGHBOURS % every == 0)
    job = SimulatedJob.of_estimates(requests.subset(rows))
    tables = []
    for policy in POLICIES:
        schedule = schedule_requests(job.requests, policy=policy, seed=0, num_shards=1, costs=costs)
        (result,) = run_schedule(job, schedule, machine)
        tables.append(_table(policy, result, machine.capacity_tokens, every))
    return pa.concat_tables(tables)


def _table(policy: Policy, result: SimulationResult, capacity_tokens: int, every: int) -> pa.Table:
    usage = result.usage
    together = -(-len(usage.compute) // _MAX_PIECES)
    begins = np.arange(0, len(usage.compute), together)
    sizes = np.diff(np.append(begins, len(usage.compute)))

    def mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.add.reduceat(values, begins) / sizes

    columns = {
        "policy": np.repeat(policy, len(begins)),
        "started_seconds": begins * usage.piece_seconds * every,
        "compute_share": mean(usage.compute),
        "memory_share": mean(usage.memory),
        "cache_share": mean(usage.held_tokens) / capacity_tokens,
    }
    return pa.table(columns, schema=PREDICTED_USAGE)
