"""Runs a workload under one policy: with known lengths in one go, otherwise planning again as lengths become known."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from blendserve.planner.observed_simulator import ObservedSimulator
from blendserve.planner.output_lengths import OutputLengths, estimate_output_lengths
from blendserve.planner.prefix_tree import build_prefix_tree
from blendserve.planner.schedule import CostModel, PlannedRequests, Schedule, schedule_requests, shared_with_previous
from blendserve.planner.simulation import SimulatedMachine, SimulatedRequests, SimulatedShard, SimulationResult
from blendserve.planner.simulator import Simulator
from blendserve.planner.stratified_sample import ASSUMED_OUTPUT_TOKENS, MIN_SAMPLED, draw_stratified
from blendserve.spec import Policy

Lengths = Literal["known", "sampled"]
_USING_LENGTHS: Final[tuple[Policy, ...]] = ("blend", "longest")
_SAMPLED_FRACTION = 0.01
_MAX_OUTPUT_TOKENS = 131_072  # nothing better is known of a workload's limits
_FIRST_ROUND_SECONDS = 10.0
# Compute over memory time of a step while lengths are guesses: both in full use. That gets memory-heavy requests done
# as early as may be, so that one that turns out long doesn't end up alone.
_LEARNING_PACE = 1.0


@dataclass(frozen=True, slots=True)
class SimulatedJob:
    """A workload in the order of its prompts: what the planner knows and, [num_requests], the lengths to come."""

    requests: PlannedRequests
    output_tokens: NDArray[np.int64]

    @property
    def num_requests(self) -> int:
        return self.requests.num_requests

    @property
    def prefix_sharing(self) -> float:
        """The most that any order can share, of the prompt tokens."""
        prompt_tokens = int(self.requests.num_prompt_tokens.sum())
        return int(self.requests.shared_prefix_tokens.sum()) / max(prompt_tokens, 1)

    @property
    def lengths(self) -> OutputLengths:
        """The output lengths that the planner knows."""
        requests = self.requests
        return OutputLengths(
            requests.mean_output_tokens, requests.mean_square_output_tokens, np.zeros(self.num_requests, np.int64)
        )

    def simulated_requests(self) -> SimulatedRequests:
        """What the simulator has to run."""
        tree = build_prefix_tree(self.requests.shared_prefix_tokens)
        return SimulatedRequests(tree, self.requests.num_prompt_tokens, self.output_tokens)

    def subset(self, rows: NDArray[np.int64], lengths: OutputLengths) -> PlannedRequests:
        """Only `rows` (ascending) of the job, with `lengths` of the whole job as what the planner knows."""
        return PlannedRequests(
            num_prompt_tokens=self.requests.num_prompt_tokens[rows],
            shared_prefix_tokens=shared_with_previous(self.requests.shared_prefix_tokens, rows),
            mean_output_tokens=lengths.mean[rows],
            mean_square_output_tokens=lengths.mean_square[rows],
            arrival=self.requests.arrival[rows],
        )


@dataclass(frozen=True, slots=True)
class PolicyRun:
    """What each machine did, and the time it took to plan."""

    results: list[SimulationResult]
    planning_seconds: float


def run_schedule(job: SimulatedJob, schedule: Schedule, machine: SimulatedMachine) -> list[SimulationResult]:
    """Replay every shard of `schedule` on a machine of its own."""
    requests, everyone = job.simulated_requests(), np.arange(job.num_requests)
    simulators = [Simulator(requests, machine) for _ in range(schedule.num_shards)]
    for number, simulator in enumerate(simulators):
        simulator.assign(_shard(schedule, number, everyone, job, job.lengths))
        simulator.run()
    return [simulator.result() for simulator in simulators]


def run_policy(
    job: SimulatedJob,
    *,
    policy: Policy,
    gpus: int,
    lengths: Lengths,
    machine: SimulatedMachine,
    costs: CostModel,
    seed: int = 0,
) -> PolicyRun:
    """Run `job` on `gpus` machines side by side. Policies that use no lengths run alike whether they are known."""
    if lengths == "known" or policy not in _USING_LENGTHS or job.num_requests < 2 * MIN_SAMPLED:
        started = time.monotonic()
        schedule = schedule_requests(job.requests, policy=policy, seed=seed, num_shards=gpus, costs=costs)
        planning_seconds = time.monotonic() - started
        return PolicyRun(run_schedule(job, schedule, machine), planning_seconds)
    return _LearningRun(job, policy=policy, gpus=gpus, machine=machine, costs=costs, seed=seed).run()


class _LearningRun:
    """Lengths become known while requests run.

    The sample goes first, with what prefills most beside it. What is left is then planned by what has been seen, and
    planned again whenever the run has become twice as long; requests that still run count as longer than they are.
    """

    def __init__(
        self, job: SimulatedJob, *, policy: Policy, gpus: int, machine: SimulatedMachine, costs: CostModel, seed: int
    ) -> None:
        self._job = job
        self._policy, self._costs, self._seed = policy, costs, seed
        requests = job.simulated_requests()
        self._tree = requests.tree
        self._simulators = [ObservedSimulator(requests, machine) for _ in range(gpus)]
        self._planning_seconds = 0.0

    def run(self) -> PolicyRun:
        sampled = self._assign_sample()
        end = _FIRST_ROUND_SECONDS
        while True:
            for simulator in self._simulators:
                simulator.run(until_seconds=end)
            end *= 2
            rows = np.sort(np.concatenate([simulator.remaining for simulator in self._simulators]))
            if len(rows) < len(self._simulators):
                break
            if not np.isin(sampled, rows).any():
                self._assign(rows)
        for simulator in self._simulators:
            simulator.run()
        return PolicyRun([simulator.result() for simulator in self._simulators], self._planning_seconds)

    def _assign_sample(self) -> NDArray[np.int64]:
        """The sample first, short prompts before long ones; then the rest, those that prefill most at the front."""
        everyone = np.arange(self._job.num_requests)
        prompts = self._job.requests.num_prompt_tokens
        num_sampled = max(MIN_SAMPLED, math.ceil(_SAMPLED_FRACTION * len(everyone)))
        sampled = draw_stratified(self._job.requests.shared_prefix_tokens, prompts, everyone, num_sampled)
        others = np.setdiff1d(everyone, sampled)
        sampled = sampled[np.argsort(prompts[sampled], kind="stable")]
        assumed = np.full(len(everyone), float(ASSUMED_OUTPUT_TOKENS))
        lengths = OutputLengths(assumed, assumed**2, everyone)
        schedule = self._plan(others, lengths, "blend", _prefill_costs(self._costs))
        for number, simulator in enumerate(self._simulators):
            mine = sampled[number :: len(self._simulators)]
            shard = _shard(schedule, number, others, self._job, lengths)
            simulator.assign(_put_first(shard, mine, lengths, prompts))
        return sampled

    def _assign(self, rows: NDArray[np.int64]) -> None:
        """Plan `rows`, which haven't been admitted, by all that has been seen."""
        lengths = self._estimate()
        for simulator in self._simulators:
            admitted = simulator.admitted
            simulator.revise(admitted, lengths.estimated_tokens[admitted].astype(np.int64))
        schedule = self._plan(rows, lengths, self._policy, self._costs)
        for number, simulator in enumerate(self._simulators):
            shard = _shard(schedule, number, rows, self._job, lengths)
            simulator.assign(replace(shard, pace=_LEARNING_PACE))

    def _plan(self, rows: NDArray[np.int64], lengths: OutputLengths, policy: Policy, costs: CostModel) -> Schedule:
        started = time.monotonic()
        requests = self._job.subset(rows, lengths)
        num_shards = len(self._simulators)
        begun = np.array([simulator.begun_seconds() for simulator in self._simulators]).T
        schedule = schedule_requests(
            requests, policy=policy, seed=self._seed, num_shards=num_shards, costs=costs, begun=begun
        )
        self._planning_seconds += time.monotonic() - started
        return schedule

    def _estimate(self) -> OutputLengths:
        """Of all requests, by those that have finished and by how far the others are."""
        num_requests = self._job.num_requests
        observed = np.full(num_requests, np.nan)
        is_cut_off = np.zeros(num_requests, np.bool_)
        for simulator in self._simulators:
            admitted, finished = simulator.admitted, simulator.finished
            observed[admitted], is_cut_off[admitted] = simulator.num_produced(admitted), True
            observed[finished] = simulator.num_produced(finished)
        return estimate_output_lengths(
            self._tree,
            num_prompt_tokens=self._job.requests.num_prompt_tokens,
            max_tokens=np.full(num_requests, _MAX_OUTPUT_TOKENS),
            hints=np.full(num_requests, np.nan),
            observed=observed,
            is_cut_off=is_cut_off,
            ignore_eos=False,
        )


def _prefill_costs(costs: CostModel) -> CostModel:
    """What is known before any length is: compute time is the prefill's, memory time the same for all."""

    def prefill_costs(
        *,
        num_prompt_tokens: NDArray[np.int64],
        shared_prefix_tokens: NDArray[np.int64],
        mean_output_tokens: NDArray[np.float64],
        mean_square_output_tokens: NDArray[np.float64],
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        one = np.ones(len(num_prompt_tokens))
        compute, _ = costs(
            num_prompt_tokens=num_prompt_tokens,
            shared_prefix_tokens=shared_prefix_tokens,
            mean_output_tokens=one,
            mean_square_output_tokens=one,
        )
        return compute, np.ones(len(mean_output_tokens))

    return prefill_costs


def _shard(
    schedule: Schedule, number: int, rows: NDArray[np.int64], job: SimulatedJob, lengths: OutputLengths
) -> SimulatedShard:
    """Shard `number` of a schedule of the requests `rows`, with `lengths` of the whole job."""
    places = np.flatnonzero(schedule.shard == number)
    positions = rows[schedule.positions[places]]
    known = lengths.take(positions)
    return SimulatedShard(
        positions=positions,
        estimated_output_tokens=known.estimated_tokens.astype(np.int64),
        footprint_tokens=known.footprint_tokens(job.requests.num_prompt_tokens[positions]),
        compute_seconds=schedule.compute_seconds[places],
        memory_seconds=schedule.memory_seconds[places],
        unit_density=schedule.unit_density[places],
        is_two_ended=schedule.is_two_ended,
        reserves_output=schedule.is_two_ended,
    )


def _put_first(
    shard: SimulatedShard, first: NDArray[np.int64], lengths: OutputLengths, prompts: NDArray[np.int64]
) -> SimulatedShard:
    """`shard` with the requests `first` before it, admitted in this order; their costs aren't known."""
    known, nothing = lengths.take(first), np.zeros(len(first))
    return SimulatedShard(
        positions=np.concatenate([first, shard.positions]),
        estimated_output_tokens=np.concatenate([known.estimated_tokens, shard.estimated_output_tokens]),
        footprint_tokens=np.concatenate([known.footprint_tokens(prompts[first]), shard.footprint_tokens]),
        compute_seconds=np.concatenate([nothing, shard.compute_seconds]),
        memory_seconds=np.concatenate([nothing, shard.memory_seconds]),
        unit_density=np.concatenate([nothing, shard.unit_density]),
        is_two_ended=False,
        reserves_output=True,
        pace=_LEARNING_PACE,
    )
