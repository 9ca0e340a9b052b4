"""What a simulation is given, a shard of requests on a machine, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blendserve.planner.performance_model import CostConstants
from blendserve.planner.prefix_tree import PrefixTree


@dataclass(frozen=True, slots=True)
class SimulatedMachine:
    """What a step may hold and what it costs. `step_seconds` is the least a step takes: reading all weights once."""

    constants: CostConstants
    step_seconds: float
    capacity_tokens: int
    max_batched_tokens: int
    is_overlapped: bool


@dataclass(frozen=True, slots=True)
class SimulatedShard:
    """Requests in shard order, arrays [num_requests]; `positions` are their places in the order of `tree`."""

    tree: PrefixTree
    positions: NDArray[np.int64]
    num_prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    estimated_output_tokens: NDArray[np.int64]
    compute_seconds: NDArray[np.float64]
    memory_seconds: NDArray[np.float64]
    unit_density: NDArray[np.float64]
    is_two_ended: bool


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """Totals of one shard. `compute_seconds` and `memory_seconds` are the work done, whether overlapped or not."""

    seconds: float
    compute_seconds: float
    memory_seconds: float
    num_steps: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    num_preemptions: int
