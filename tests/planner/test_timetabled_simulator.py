"""Where the engine would follow a timetable the simulator does, and takes as many steps as the engine's scheduler."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.dry_run import DryRun
from blendserve.dual_scanner import DualScanner
from blendserve.engine.kv_cache import KVCache
from blendserve.engine.request import Request
from blendserve.engine.scheduler import Scheduler
from blendserve.known_lengths import KnownLengths
from blendserve.planner.schedule import schedule_requests
from blendserve.planner.simulated_job import SimulatedJob
from blendserve.planner.simulated_run import run_schedule, shard_of
from blendserve.planner.simulation import SimulationResult
from blendserve.planner.timetabled_simulator import timetable_for
from tests.planner.test_simulator import job_of, machine, unit_costs

BLOCK_SIZE, NUM_BLOCKS, STEP_TOKENS = 128, 150, 4096
MACHINE = machine(capacity=NUM_BLOCKS * BLOCK_SIZE, is_overlapped=False, max_batched_tokens=STEP_TOKENS)


def mixed_job(seed: int, num_prompts: int = 250, num_long: int = 60) -> SimulatedJob:
    """Prompts with a few tokens of output, and short prompts with long outputs, which share nothing."""
    random = np.random.default_rng(seed)
    prompts = np.concatenate((random.integers(200, 1500, num_prompts), random.integers(10, 40, num_long)))
    outputs = np.concatenate((np.full(num_prompts, 4), random.integers(200, 600, num_long)))
    return job_of(prompts.tolist(), [0] * len(prompts), outputs.tolist())


def simulate(job: SimulatedJob) -> SimulationResult:
    plan = partial(schedule_requests, seed=0, num_shards=1, costs=unit_costs)
    (result,) = run_schedule(job, plan(job.requests, policy="blend"), MACHINE)
    return result


class Source:
    """The job's only shard, as the engine reads it."""

    learner = None

    def __init__(self, job: SimulatedJob) -> None:
        everyone = np.arange(job.num_requests)
        schedule = schedule_requests(job.requests, policy="blend", seed=0, num_shards=1, costs=unit_costs)
        self._shard = shard = shard_of(schedule, 0, everyone, job, job.lengths)
        self._prompts = job.requests.num_prompt_tokens[shard.positions]
        self.lengths = KnownLengths(self._prompts, shard.estimated_output_tokens, shard.shared_tokens)
        self.scanner = DualScanner(
            compute_seconds=shard.compute_seconds,
            memory_seconds=shard.memory_seconds,
            unit_density=shard.unit_density,
            is_two_ended=True,
        )

    def request(self, position: int) -> Request:
        tokens = np.random.default_rng(position).integers(0, 1000, int(self._prompts[position]))
        return Request(
            position=position,
            row_index=position,
            request_id=str(position),
            prompt_token_ids=tokens.astype(np.int32),
            max_tokens=int(self._shard.estimated_output_tokens[position]),
            estimated_output_tokens=int(self._shard.estimated_output_tokens[position]),
        )


@pytest.mark.parametrize("seed", range(3))
def test_it_takes_as_many_steps_as_the_engine(seed: int) -> None:
    job = mixed_job(seed)
    scheduler = Scheduler(
        Source(job),
        KVCache(NUM_BLOCKS, BLOCK_SIZE, has_prefix_cache=True),
        max_num_seqs=MACHINE.max_num_seqs,
        max_num_batched_tokens=STEP_TOKENS,
        max_model_len=4000,
    )
    steps = [step.batch.num_tokens for step in DryRun(scheduler).steps()]
    simulated = simulate(job)
    assert simulated.num_steps == pytest.approx(len(steps), rel=0.02)
    assert simulated.num_preemptions == 0
    assert simulated.num_output_tokens == int(job.output_tokens.sum())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 200), st.integers(1, 80))
def test_all_work_is_done(seed: int, num_prompts: int, num_long: int) -> None:
    job = mixed_job(seed, num_prompts, num_long)
    simulated = simulate(job)
    assert simulated.num_prompt_tokens == int(job.requests.num_prompt_tokens.sum())
    assert simulated.num_output_tokens == int(job.output_tokens.sum())


def test_the_cache_is_full_by_half_once_it_has_filled() -> None:
    job = mixed_job(1)
    source = Source(job)
    assert timetable_for(job.simulated_requests(), MACHINE, source._shard) is not None
    overlapped = machine(capacity=NUM_BLOCKS * BLOCK_SIZE, max_batched_tokens=STEP_TOKENS)
    assert timetable_for(job.simulated_requests(), overlapped, source._shard) is None, "there the fronts have a pace"
    held = simulate(job).usage.held_tokens
    assert held[len(held) // 4 : len(held) // 2].mean() > 0.5 * MACHINE.capacity_tokens
