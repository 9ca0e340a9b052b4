"""What a simulation is given, requests on a machine, and what it answers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blendserve.length_learning import ShardLengths
from blendserve.planner.performance_model import CostConstants
from blendserve.planner.prefix_tree import PrefixTree


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step or a stretch of steps takes: `compute` with reading the weights, `needed_compute` without."""

    seconds: float
    compute: float
    needed_compute: float
    memory: float


@dataclass(frozen=True, slots=True)
class SimulatedMachine:
    """What a step may hold and what it costs. `step_seconds` is the least its products take: reading all weights once.

    overhead_seconds: what each step takes besides, of which nothing overlaps.
    unplanned_batched_tokens: what a step may hold where nothing says how much prefill a step has room for; more of it
    would make every long output wait. None: it is this engine, which takes what `step_tokens.py` says and admits by the
    estimated output in any order.
    interference: how much of the shorter of compute and memory time a step adds to the longer one, from 0 (perfect
    overlap) to 1 (one after the other).
    """

    constants: CostConstants
    step_seconds: float
    capacity_tokens: int
    max_batched_tokens: int
    interference: float
    overhead_seconds: float = 0.0
    max_num_seqs: int = 1024
    block_size: int = 128
    unplanned_batched_tokens: int | None = 512

    @property
    def decode_token_seconds(self) -> float:
        """Compute time of one decoded token."""
        return self.constants.seconds_per_layer_token + self.constants.seconds_per_sampled_token

    def step(self, needed_compute: float, context_tokens: int) -> StepWork:
        """One step whose decoding requests read `context_tokens` of KV cache."""
        compute = max(needed_compute, self.step_seconds)
        memory = context_tokens * self.constants.seconds_per_kv_token
        return StepWork(self.overhead_seconds + self._together(compute, memory), compute, needed_compute, memory)

    def decode_steps(self, num_steps: int, num_decoding: int, context_tokens: int) -> StepWork:
        """`num_steps` steps of nothing but decoding; the first reads `context_tokens`, each later one a token more a
        request."""
        needed = num_decoding * self.decode_token_seconds
        compute = max(needed, self.step_seconds)
        first = context_tokens * self.constants.seconds_per_kv_token
        slope = num_decoding * self.constants.seconds_per_kv_token
        memory = num_steps * first + slope * num_steps * (num_steps - 1) / 2
        bound = min(max(math.ceil((compute - first) / slope), 0), num_steps)  # first steps, bound by compute
        later = slope * (num_steps * (num_steps - 1) - bound * (bound - 1)) / 2
        longer = bound * compute + (num_steps - bound) * first + later
        together = longer + self.interference * (num_steps * compute + memory - longer)
        seconds = num_steps * self.overhead_seconds + together
        return StepWork(seconds, num_steps * compute, num_steps * needed, memory)

    def _together(self, compute: float, memory: float) -> float:
        shorter, longer = (compute, memory) if compute < memory else (memory, compute)
        return longer + self.interference * shorter

    @property
    def is_overlapped(self) -> bool:
        return self.interference < 1


@dataclass(frozen=True, slots=True)
class SimulatedRequests:
    """All requests of a workload in the order of `tree`; arrays [num_requests]. No planner sees the outputs."""

    tree: PrefixTree
    num_prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]

    def read_tokens(self, prefix_readers: float) -> NDArray[np.int64]:
        """[num_requests]: prompt tokens that a decode step reads for each, of what is read together its part."""
        shared = self.tree.depth_tokens[self.tree.leaf_node]
        return np.rint(self.num_prompt_tokens - shared * (1 - 1 / prefix_readers)).astype(np.int64)


@dataclass(frozen=True, slots=True)
class SimulatedShard:
    """What a machine has to admit, in this order; arrays [num_admitted], `positions` in the order of the tree.

    footprint_tokens: KV cache tokens that a request holds on average over its life.
    reserves_output: admit only what fits with its estimated output. Otherwise requests are admitted as long as their
    prompts fit, and the latest are preempted when the cache is full, as engines do that know no lengths.
    pace: compute over memory time that each step aims at; None: that of all that is left.
    shared_tokens: of each prompt, in common with its neighbour before in the order of the tree.
    begun_tokens: output tokens that requests had generated when an earlier run cut them off. lengths: what the run
    learns output lengths from; None: they stay as they are estimated.
    """

    positions: NDArray[np.int64]
    estimated_output_tokens: NDArray[np.int64]
    footprint_tokens: NDArray[np.float64]
    compute_seconds: NDArray[np.float64]
    memory_seconds: NDArray[np.float64]
    unit_density: NDArray[np.float64]
    shared_tokens: NDArray[np.int64]
    is_two_ended: bool
    reserves_output: bool
    pace: float | None = None
    begun_tokens: NDArray[np.int64] | None = None
    lengths: ShardLengths | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """What a machine did over time, in pieces of equal length; arrays [num_pieces].

    compute, memory: seconds of work in each piece over its length; held_tokens: mean KV cache tokens.
    """

    piece_seconds: float
    compute: NDArray[np.float64]
    memory: NDArray[np.float64]
    held_tokens: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """Totals of one machine. `compute_seconds` and `memory_seconds` are the work done, whether overlapped or not."""

    seconds: float
    compute_seconds: float
    memory_seconds: float
    num_steps: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    num_preemptions: int
    usage: Usage

    def then(self, later: SimulationResult) -> SimulationResult:
        """Both, one after the other on one machine; the usage of `later` is that of both."""
        names = (name for name in self.__dataclass_fields__ if name != "usage")
        return SimulationResult(
            **{name: getattr(self, name) + getattr(later, name) for name in names}, usage=later.usage
        )


def no_work() -> SimulationResult:
    """A machine that has done nothing yet."""
    nothing = np.zeros(0)
    return SimulationResult(0.0, 0.0, 0.0, 0, 0, 0, 0, 0, Usage(1.0, nothing, nothing, nothing))
