"""Runs a workload under one policy as a job runs: a sample where lengths aren't known, a plan, then its shards."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from blendserve.admission_rate import LEARNING_DENSITY
from blendserve.length_learning import ObservedLengths, ShardLengths
from blendserve.planner.length_classes import length_classes
from blendserve.planner.output_lengths import OutputLengths, estimate_output_lengths
from blendserve.planner.schedule import CostModel, Schedule, schedule_requests
from blendserve.planner.simulated_job import SimulatedJob
from blendserve.planner.simulation import (
    SimulatedMachine,
    SimulatedRequests,
    SimulatedShard,
    SimulationResult,
    no_work,
)
from blendserve.planner.simulator import Simulator
from blendserve.planner.stratified_sample import (
    ASSUMED_OUTPUT_TOKENS,
    MIN_SAMPLED,
    SAMPLE_TOKENS,
    choose_companions,
    draw_stratified,
)
from blendserve.planner.timetabled_simulator import TimetabledSimulator, timetable_for
from blendserve.planner.usage_recorder import UsageRecorder
from blendserve.spec import Policy

Lengths = Literal["known", "sampled"]
_USING_LENGTHS: Final[tuple[Policy, ...]] = ("blend", "longest")
_SAMPLED_FRACTION = 0.01
_MAX_OUTPUT_TOKENS = 131_072  # nothing better is known of a workload's limits


@dataclass(frozen=True, slots=True)
class PolicyRun:
    """What each machine did, and the time it took to plan."""

    results: list[SimulationResult]
    planning_seconds: float


def run_schedule(job: SimulatedJob, schedule: Schedule, machine: SimulatedMachine) -> list[SimulationResult]:
    """Replay every shard of `schedule` on a machine of its own."""
    requests, everyone = job.simulated_requests(), np.arange(job.num_requests)
    shards = (shard_of(schedule, number, everyone, job, job.lengths) for number in range(schedule.num_shards))
    return [_replay(requests, machine, shard, UsageRecorder()) for shard in shards]


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
    """Run `job` in a shard for each of `gpus` machines side by side, which take one whenever they are free.

    Policies that use no lengths run alike whether they are known.
    """
    is_known = lengths == "known" or policy not in _USING_LENGTHS or job.num_requests < 2 * MIN_SAMPLED
    run = _KnownRun if is_known else _LearningRun
    return run(job, policy=policy, gpus=gpus, machine=machine, costs=costs, seed=seed).run()


class _KnownRun:
    """All lengths are known: one plan of everything."""

    def __init__(
        self,
        job: SimulatedJob,
        *,
        policy: Policy,
        gpus: int,
        machine: SimulatedMachine,
        costs: CostModel,
        seed: int,
    ) -> None:
        self._job, self._requests = job, job.simulated_requests()
        self._policy, self._costs, self._seed = policy, costs, seed
        self._machine = machine
        self._done = [no_work() for _ in range(gpus)]
        self._usages = [UsageRecorder() for _ in range(gpus)]
        self._planning_seconds = 0.0

    def run(self) -> PolicyRun:
        everyone = np.arange(self._job.num_requests)
        schedule = self._plan(everyone, self._job.lengths)
        self._run_shards(
            shard_of(schedule, number, everyone, self._job, self._job.lengths) for number in range(schedule.num_shards)
        )
        return PolicyRun(self._done, self._planning_seconds)

    def _run_shards(self, shards: Iterable[SimulatedShard]) -> None:
        """Each in turn on the machine that is free first."""
        for shard in shards:
            number = min(range(len(self._done)), key=lambda number: self._done[number].seconds)
            self._done[number] = self._done[number].then(
                _replay(self._requests, self._machine, shard, self._usages[number])
            )

    def _plan(self, rows: NDArray[np.int64], lengths: OutputLengths) -> Schedule:
        started = time.monotonic()
        schedule = schedule_requests(
            self._job.subset(rows, lengths),
            policy=self._policy,
            seed=self._seed,
            num_shards=len(self._done),
            costs=self._costs,
        )
        self._planning_seconds += time.monotonic() - started
        return schedule


class _LearningRun(_KnownRun):
    """No length is known: a sample runs on one machine, with a limit and what prefills most beside it.

    What is left is then planned by what the sample has shown; what the limit cut off goes on where it stopped. While a
    shard runs it learns more: see `LengthLearner`.
    """

    def run(self) -> PolicyRun:
        job, num_requests = self._job, self._job.num_requests
        tree, prompts = self._requests.tree, job.requests.num_prompt_tokens
        started = time.monotonic()
        sampled = self._choose_sample()
        self._planning_seconds += time.monotonic() - started
        self._run_sample(sampled)
        is_cut_off = job.output_tokens > SAMPLE_TOKENS
        observed = np.full(num_requests, np.nan)
        observed[sampled] = np.minimum(job.output_tokens[sampled], SAMPLE_TOKENS)
        started = time.monotonic()
        lengths = estimate_output_lengths(
            tree,
            num_prompt_tokens=prompts,
            max_tokens=np.full(num_requests, _MAX_OUTPUT_TOKENS),
            hints=np.full(num_requests, np.nan),
            observed=observed,
            is_cut_off=is_cut_off & ~np.isnan(observed),
            ignore_eos=False,
        )
        classes = length_classes(tree, prompts)
        self._planning_seconds += time.monotonic() - started
        seen = ObservedLengths(classes[sampled], observed[sampled].astype(np.int64), is_cut_off[sampled])
        rows = np.setdiff1d(np.arange(num_requests), sampled[~is_cut_off[sampled]])
        begun = np.where(np.isnan(observed), 0, observed).astype(np.int64)
        schedule = self._plan(rows, lengths)
        self._run_shards(
            self._learning(shard_of(schedule, number, rows, job, lengths), schedule, number, begun, classes, seen)
            for number in range(schedule.num_shards)
        )
        return PolicyRun(self._done, self._planning_seconds)

    def _choose_sample(self) -> NDArray[np.int64]:
        """The sampled requests, then their companions."""
        requests = self._job.requests
        shared, prompts = requests.shared_prefix_tokens, requests.num_prompt_tokens
        everyone = np.arange(self._job.num_requests)
        num_sampled = max(MIN_SAMPLED, math.ceil(_SAMPLED_FRACTION * len(everyone)))
        sampled = draw_stratified(shared, prompts, everyone, num_sampled)
        free_tokens = self._machine.step_seconds / self._machine.constants.seconds_per_layer_token
        companions = choose_companions(
            shared, prompts, np.setdiff1d(everyone, sampled), max_tokens=SAMPLE_TOKENS * free_tokens
        )
        return np.concatenate([sampled, companions])

    def _run_sample(self, rows: NDArray[np.int64]) -> None:
        cut = np.minimum(self._job.output_tokens, SAMPLE_TOKENS)
        requests = SimulatedRequests(self._requests.tree, self._requests.num_prompt_tokens, cut)
        assumed = np.full(len(rows), ASSUMED_OUTPUT_TOKENS)
        prompts = self._job.requests.num_prompt_tokens[rows]
        shard = SimulatedShard(
            positions=rows,
            estimated_output_tokens=assumed,
            footprint_tokens=prompts + assumed / 2,
            compute_seconds=np.zeros(len(rows)),
            memory_seconds=np.zeros(len(rows)),
            unit_density=np.zeros(len(rows)),
            shared_tokens=self._job.requests.shared_prefix_tokens[rows].astype(np.int64),
            is_two_ended=False,
            reserves_output=True,
            pace=LEARNING_DENSITY,
        )
        result = _replay(requests, self._machine, shard, self._usages[0])
        # What was cut off is answered by a shard: only its work counts here.
        kept = self._job.output_tokens[rows] <= SAMPLE_TOKENS
        result = replace(
            result,
            num_prompt_tokens=int(prompts[kept].sum()),
            num_output_tokens=int(self._job.output_tokens[rows][kept].sum()),
        )
        self._done[0] = self._done[0].then(result)
        for number in range(1, len(self._done)):  # the others wait
            self._done[number] = replace(self._done[number], seconds=result.seconds)
            self._usages[number].add(result.seconds, 0.0, 0.0, 0.0)

    def _learning(
        self,
        shard: SimulatedShard,
        schedule: Schedule,
        number: int,
        begun: NDArray[np.int64],
        classes: NDArray[np.int32],
        seen: ObservedLengths,
    ) -> SimulatedShard:
        """`shard` with what it learns from."""
        places = np.flatnonzero(schedule.shard == number)
        positions, constants = shard.positions, self._machine.constants
        lengths = ShardLengths(
            classes=classes[positions],
            estimated_tokens=shard.estimated_output_tokens,
            max_tokens=np.full(len(positions), _MAX_OUTPUT_TOKENS),
            kv_prompt_tokens=self._requests.read_tokens(constants.prefix_readers)[positions],
            unit_id=schedule.unit_id[places],
            compute_seconds=shard.compute_seconds,
            memory_seconds=shard.memory_seconds,
            seconds_per_prompt_token=constants.seconds_per_layer_token,
            seconds_per_decode_token=self._machine.decode_token_seconds,
            seconds_per_kv_token=constants.seconds_per_kv_token,
            observed=seen,
        )
        return replace(shard, lengths=lengths, begun_tokens=begun[positions], pace=LEARNING_DENSITY)


def _replay(
    requests: SimulatedRequests, machine: SimulatedMachine, shard: SimulatedShard, usage: UsageRecorder
) -> SimulationResult:
    timetable = timetable_for(requests, machine, shard)
    simulator = (
        Simulator(requests, machine, shard, usage)
        if timetable is None
        else TimetabledSimulator(requests, machine, shard, timetable, usage)
    )
    simulator.run()
    return simulator.result()


def shard_of(
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
        shared_tokens=job.requests.shared_prefix_tokens[positions].astype(np.int64),
        is_two_ended=schedule.is_two_ended,
        reserves_output=schedule.is_two_ended,
    )
