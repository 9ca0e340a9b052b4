"""The simulator: all work is done whatever the policy, within the cache, and blending overlaps what others don't."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blendserve.planner.memory_peak import peak_tokens
from blendserve.planner.performance_model import CostConstants
from blendserve.planner.schedule import PlannedRequests, schedule_requests
from blendserve.planner.simulate import POLICIES, bound_seconds
from blendserve.planner.simulated_job import SimulatedJob
from blendserve.planner.simulated_run import run_policy, run_schedule
from blendserve.planner.simulation import SimulatedMachine
from blendserve.planner.usage_recorder import UsageRecorder

UNITS = CostConstants(
    seconds_per_layer_token=1e-3,
    seconds_per_sampled_token=1e-4,
    seconds_per_attended_pair=0.0,
    seconds_per_kv_token=1e-5,
)


def unit_costs(*, num_prompt_tokens, shared_prefix_tokens, mean_output_tokens, mean_square_output_tokens):
    """The same formulas as `request_costs` with the constants above."""
    steps = np.maximum(mean_output_tokens - 1, 0)
    layer_tokens = num_prompt_tokens - shared_prefix_tokens + steps
    read = steps * num_prompt_tokens + np.maximum(mean_square_output_tokens - mean_output_tokens, 0) / 2
    compute = layer_tokens * UNITS.seconds_per_layer_token + mean_output_tokens * UNITS.seconds_per_sampled_token
    return compute, np.maximum(np.maximum(read, layer_tokens), 1) * UNITS.seconds_per_kv_token


def machine(capacity=20_000, is_overlapped=True, max_batched_tokens=256, step_seconds=0.0, **more) -> SimulatedMachine:
    return SimulatedMachine(
        constants=UNITS,
        step_seconds=step_seconds,
        capacity_tokens=capacity,
        max_batched_tokens=max_batched_tokens,
        interference=0.0 if is_overlapped else 1.0,
        **more,
    )


def job_of(prompts, shared, outputs, estimates=None) -> SimulatedJob:
    mean = np.array(outputs if estimates is None else estimates, dtype=np.float64)
    requests = PlannedRequests(
        num_prompt_tokens=np.array(prompts, dtype=np.int64),
        shared_prefix_tokens=np.array(shared, dtype=np.int64),
        mean_output_tokens=mean,
        mean_square_output_tokens=mean**2,
        arrival=np.arange(len(prompts)),
    )
    return SimulatedJob(requests, np.array(outputs, dtype=np.int64))


def replay(job, policy="blend", num_shards=1, **options):
    plan = partial(schedule_requests, seed=0, num_shards=num_shards, costs=unit_costs)
    return run_schedule(job, plan(job.requests, policy=policy), machine(**options))


def two_kinds(count: int) -> SimulatedJob:
    """Prompts with one token of output, then short prompts with long outputs, as a depth-first walk finds them."""
    return job_of(
        [400] * count + [20] * (count // 10), [0] * (count + count // 10), [1] * count + [900] * (count // 10)
    )


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(1, 300), st.integers(0, 300), st.integers(0, 200), st.integers(1, 200)), max_size=25
    ),
    policy=st.sampled_from(POLICIES),
    num_shards=st.integers(1, 3),
    capacity=st.integers(50, 3000),
    is_overlapped=st.booleans(),
)
def test_all_work_is_done_once_under_any_policy_and_cache(rows, policy, num_shards, capacity, is_overlapped):
    prompts = [row[0] for row in rows]
    limits = [min(pair) for pair in zip(prompts, [0, *prompts[:-1]], strict=True)] if rows else []
    shared = [min(row[1], limit) for row, limit in zip(rows, limits, strict=True)]
    job = job_of(prompts, shared, [max(row[2], 1) for row in rows], [row[3] for row in rows])
    results = replay(job, policy, num_shards, capacity=capacity, is_overlapped=is_overlapped)
    assert sum(result.num_prompt_tokens for result in results) == sum(prompts)
    assert sum(result.num_output_tokens for result in results) == int(job.output_tokens.sum())
    assert sum(result.num_cached_tokens for result in results) <= sum(shared)
    for result in results:
        longest = max(result.compute_seconds, result.memory_seconds)
        assert result.seconds >= longest * (1 - 1e-9)
        if not is_overlapped:
            assert result.seconds == pytest.approx(result.compute_seconds + result.memory_seconds)


@settings(deadline=None)
@given(
    prompts=st.lists(st.integers(1, 300), min_size=1, max_size=15),
    outputs=st.lists(st.integers(1, 100), min_size=15, max_size=15),
)
def test_without_preemption_the_work_is_that_of_the_cost_model(prompts, outputs):
    outputs = outputs[: len(prompts)]
    job = job_of(prompts, [0] * len(prompts), outputs)
    (result,) = replay(job, "fcfs", capacity=10**6, is_overlapped=False)
    compute = sum((p + d - 1) * 1e-3 + d * 1e-4 for p, d in zip(prompts, outputs, strict=True))
    memory = sum(((d - 1) * p + d * (d - 1) / 2) * 1e-5 for p, d in zip(prompts, outputs, strict=True))
    assert result.num_preemptions == 0
    assert result.compute_seconds == pytest.approx(compute)
    assert result.memory_seconds == pytest.approx(memory)


def test_blending_overlaps_what_depth_first_runs_one_after_the_other():
    job = two_kinds(2000)
    (blend,), (dfs,) = replay(job, "blend"), replay(job, "dfs")
    bound = bound_seconds(job, unit_costs)
    assert blend.seconds < 1.1 * bound
    assert dfs.seconds > 1.3 * blend.seconds
    assert blend.num_preemptions == 0


def test_without_overlap_blending_gains_nothing_and_loses_nothing():
    job = two_kinds(500)
    (blend,), (dfs,) = (replay(job, policy, is_overlapped=False, capacity=10**6) for policy in ("blend", "dfs"))
    assert blend.seconds == pytest.approx(dfs.seconds, rel=0.02)


def test_the_compute_heavy_front_is_not_starved_by_shared_prompts():
    # Budgets that count logical tokens give prompts that are mostly cached too little of each step: with 90 % of
    # the left side's tokens shared, compute would fall behind and a compute-bound tail would remain.
    groups, members = 40, 100
    shared = ([0] + [360] * (members - 1)) * groups
    count = groups * members
    job = job_of([400] * count + [20] * 100, shared + [0] * 100, [1] * count + [900] * 100)
    (blend,) = replay(job, "blend")
    assert blend.seconds < 1.1 * bound_seconds(job, unit_costs)
    assert blend.num_cached_tokens >= 0.99 * sum(shared)


def test_each_step_is_balanced_although_all_memory_heavy_requests_start_together():
    # Filling the cache in one go puts all requests into one phase: the memory time of a step then swings. Prefill
    # follows it, so that neither resource waits: the sum of the steps' maxima stays near the larger total.
    job = job_of([100] * 6000 + [10] * 60, [0] * 6060, [1] * 6000 + [1500] * 60)
    (blend,) = replay(job, "blend", capacity=60_000, max_batched_tokens=1024)
    assert blend.seconds < 1.1 * max(blend.compute_seconds, blend.memory_seconds)


def test_a_cache_that_is_too_small_preempts_and_still_finishes():
    job = job_of([10] * 20, [0] * 20, [200] * 20, [5] * 20)  # estimates far too low
    (result,) = replay(job, "fcfs", capacity=500)
    assert result.num_preemptions > 0
    assert result.num_output_tokens == 4000


def test_this_engine_admits_by_estimated_outputs_in_any_order_and_others_by_prompts():
    job = job_of([10] * 20, [0] * 20, [200] * 20)
    others, ours = (
        replay(job, "fcfs", capacity=1000, unplanned_batched_tokens=tokens)[0].num_preemptions for tokens in (512, None)
    )
    assert others > 0 and ours == 0


def test_a_prompt_longer_than_the_cache_runs_alone():
    (result,) = replay(job_of([5000, 10], [0, 0], [3, 3]), "fcfs", capacity=100)
    assert result.num_prompt_tokens == 5010


def test_parts_of_equal_work_take_equal_time():
    job = two_kinds(4000)
    (alone,) = replay(job, "blend")
    halves = replay(job, "blend", num_shards=2)
    assert alone.seconds / max(half.seconds for half in halves) > 1.9


def learn(job, **options):
    machine_ = machine(**options)
    run = run_policy(job, policy="blend", gpus=1, lengths="sampled", machine=machine_, costs=unit_costs)
    return run.results[0]


def without_lengths(job) -> SimulatedJob:
    """The same job with outputs that the planner can't know."""
    return job_of(
        job.requests.num_prompt_tokens, job.requests.shared_prefix_tokens, job.output_tokens, [1] * job.num_requests
    )


def test_a_sample_run_beside_the_job_costs_little():
    job = two_kinds(4000)
    (known,) = replay(job, "blend", step_seconds=0.05, capacity=60_000)
    learnt = learn(without_lengths(job), step_seconds=0.05, capacity=60_000)
    assert learnt.seconds < 1.02 * known.seconds
    assert learnt.num_output_tokens == job.output_tokens.sum()
    # Read literally, the sample goes before everything: alone, long outputs take hundreds of steps of their own.
    sample = job_of([400] * 40 + [20] * 8, [0] * 48, [1] * 40 + [900] * 8)
    (alone,) = replay(sample, "fcfs", step_seconds=0.05)
    assert alone.seconds > 0.03 * known.seconds


def test_requests_that_outlive_their_estimate_count_as_memory_heavy():
    # Estimated as short ones at the compute-heavy front; once they outlive that, no more of them may fill the cache.
    job = job_of([400] * 300 + [20] * 25, [0] * 325, [1] * 300 + [900] * 25, [1] * 325)
    (result,) = replay(job, "blend")
    assert result.num_output_tokens == 300 + 22_500
    assert result.num_preemptions < 25


def test_usage_over_time_adds_up():
    (result,) = replay(two_kinds(500), "blend")
    usage = result.usage
    assert len(usage.compute) <= 513
    assert usage.compute.sum() * usage.piece_seconds == pytest.approx(result.compute_seconds)
    assert usage.memory.sum() * usage.piece_seconds == pytest.approx(result.memory_seconds)
    assert usage.held_tokens.max() <= 20_000


def test_a_run_of_microseconds_has_more_than_one_piece():
    usage = UsageRecorder()
    usage.add(3e-5, 2e-5, 1e-5, 100.0)
    assert 3 <= len(usage.usage().compute) <= 513


def test_peak_is_that_of_stepping_through():
    random = np.random.default_rng(0)
    for _ in range(200):
        count, horizon = int(random.integers(0, 8)), int(random.integers(1, 30))
        own, rest = random.integers(0, 50, count), random.integers(1, 30, count)
        held = int(own.sum()) + 7
        use = [
            held + (count + 1 - int((rest < step).sum())) * step - int((own + 0)[rest < step].sum())
            for step in range(1, horizon + 1)
        ]
        assert peak_tokens(held, own, rest, horizon) == max(use)


def test_a_shared_prefix_kernel_takes_less_memory_time():
    job = job_of([500] * 50, [0] + [400] * 49, [100] * 50)
    schedule = schedule_requests(job.requests, policy="blend", seed=0, num_shards=1, costs=unit_costs)
    paged, together = (
        run_schedule(job, schedule, replace(machine(), constants=replace(UNITS, prefix_readers=readers)))[0]
        for readers in (1.0, 8.0)
    )
    assert together.memory_seconds == pytest.approx(50 * (99 * (100 + 400 / 8) + 99 * 50) * 1e-5)
    assert paged.memory_seconds == pytest.approx(50 * (99 * 500 + 99 * 50) * 1e-5)
