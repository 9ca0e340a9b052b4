"""Timetables: what they promise holds for any lengths, and the scheduler keeps to them as long as lengths are right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.dry_run import DryRun, DryStep
from blendserve.dual_scanner import DualScanner
from blendserve.engine.kv_cache import KVCache
from blendserve.engine.request import Request
from blendserve.engine.scheduler import Scheduler
from blendserve.known_lengths import KnownLengths
from blendserve.timetable import Timetable, make_timetable

BLOCK_SIZE, NUM_BLOCKS, MAX_NUM_SEQS, STEP_TOKENS = 16, 250, 64, 256
CAPACITY = NUM_BLOCKS * BLOCK_SIZE


def make_lengths(seed: int, num_requests: int = 150) -> KnownLengths:
    """A third each of long prompts with short outputs, short prompts with long outputs, and something between."""
    random = np.random.default_rng(seed)
    kind = np.sort(random.integers(0, 3, num_requests))
    prompt = np.choose(kind, [random.integers(60, 120, num_requests), random.integers(10, 40, num_requests), 8])
    output = np.choose(kind, [4, random.integers(120, 250, num_requests), random.integers(250, 300, num_requests)])
    return KnownLengths(prompt, output, np.zeros_like(prompt))


def many_prompts() -> KnownLengths:
    """Prompts of hundreds of tokens that generate little, and a few requests that decode for long."""
    random = np.random.default_rng(5)
    prompt = np.concatenate((random.integers(200, 1500, 250), random.integers(10, 40, 60)))
    output = np.concatenate((np.full(250, 4), random.integers(150, 400, 60)))
    return KnownLengths(prompt, output, np.zeros_like(prompt))


def timetable_of(lengths: KnownLengths) -> Timetable | None:
    return make_timetable(
        lengths,
        capacity_tokens=CAPACITY,
        block_size=BLOCK_SIZE,
        max_num_seqs=MAX_NUM_SEQS,
        max_step_tokens=STEP_TOKENS,
    )


class Source:
    """Requests of these lengths, the estimates maybe others."""

    learner = None

    def __init__(self, lengths: KnownLengths, output_tokens: np.ndarray, *, has_timetable: bool) -> None:
        self.lengths = lengths if has_timetable else None
        self._stated, self._output_tokens = lengths, output_tokens
        compute = (lengths.prompt_tokens + lengths.output_tokens).astype(np.float64)
        memory = lengths.output_tokens * (lengths.prompt_tokens + lengths.output_tokens / 2)
        self.scanner = DualScanner(
            compute_seconds=compute, memory_seconds=memory, unit_density=compute / memory, is_two_ended=True
        )

    def request(self, position: int) -> Request:
        tokens = np.random.default_rng(position).integers(0, 1000, int(self._stated.prompt_tokens[position]))
        return Request(
            position=position,
            row_index=position,
            request_id=str(position),
            prompt_token_ids=tokens.astype(np.int32),
            max_tokens=300,
            estimated_output_tokens=int(self._stated.output_tokens[position]),
        )


class Steps(NamedTuple):
    """What a run's steps did, int64 [num_steps] each."""

    num_decodes: np.ndarray
    num_prefill_tokens: np.ndarray
    num_preempted: np.ndarray

    @property
    def number(self) -> int:
        return len(self.num_decodes)


def planned_steps(
    lengths: KnownLengths,
    output_tokens: np.ndarray,
    *,
    has_timetable: bool = True,
    num_blocks: int = NUM_BLOCKS,
    step_tokens: int = STEP_TOKENS,
    is_last: bool = True,
) -> Iterator[DryStep]:
    """The steps of all requests, from both fronts or by a timetable; `is_last`: of no other source after them."""
    scheduler = Scheduler(
        Source(lengths, output_tokens, has_timetable=has_timetable),
        KVCache(num_blocks, BLOCK_SIZE, True),
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=step_tokens,
        max_model_len=2000,
        is_last=is_last,
    )
    return DryRun(scheduler, lambda request: int(output_tokens[request.position])).steps()


def run(lengths: KnownLengths, output_tokens: np.ndarray, *, step_tokens: int = STEP_TOKENS, **settings: Any) -> Steps:
    """What `planned_steps` did, of which every request came to its end."""
    steps, ended = [], []
    for step in planned_steps(lengths, output_tokens, step_tokens=step_tokens, **settings):
        batch = step.batch
        steps.append((len(batch.decode_rows), batch.num_prefill_tokens, batch.num_preempted))
        assert batch.num_tokens <= step_tokens
        ended += [request.position for request in step.ended]
    assert sorted(ended) == list(range(len(output_tokens))), "each request ends once"
    return Steps(*np.array(steps).T)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 120))
def test_what_a_timetable_holds_fits(seed: int, num_requests: int) -> None:
    lengths = make_lengths(seed, num_requests)
    table = timetable_of(lengths)
    if table is None:
        return
    assert sorted(table.order.tolist()) == list(range(num_requests)) and (table.starts >= 0).all()
    ends = table.starts + lengths.output_tokens
    for step in range(0, int(ends.max()), 7):
        runs = (table.starts <= step) & (step < ends)
        held = np.where(runs, lengths.prompt_tokens + step - table.starts, 0)
        assert held.sum() <= CAPACITY and runs.sum() <= MAX_NUM_SEQS
        assert held[~table.is_flexible].sum() <= table.used_tokens[step // table.slot_steps]


@pytest.mark.parametrize("shortest", [100, 140])
def test_large_shards_have_timetables_that_fit(shortest: int) -> None:
    """Beyond 4,096 requests some begin together; where all generate much the same, evenly."""
    random = np.random.default_rng(0)
    prompt, output = random.integers(1, 30, 4500), random.integers(shortest, 150, 4500)
    lengths = KnownLengths(prompt, output, np.zeros(4500, np.int64))
    capacity, most = 10 * CAPACITY, 10 * MAX_NUM_SEQS
    table = make_timetable(
        lengths, capacity_tokens=capacity, block_size=BLOCK_SIZE, max_num_seqs=most, max_step_tokens=4096
    )
    assert table is not None
    changes = np.zeros(table.num_steps + 1)
    np.add.at(changes, table.starts, 1)
    np.add.at(changes, table.starts + output, -1)
    assert np.cumsum(changes).max() <= most and table.used_tokens.max() <= capacity
    assert table.num_steps <= 1.45 * (output * (prompt + output / 2)).sum() / capacity


def test_the_cache_is_fuller_and_nothing_is_preempted() -> None:
    lengths = make_lengths(1, 80)
    by_table = run(lengths, lengths.output_tokens)
    by_fronts = run(lengths, lengths.output_tokens, has_timetable=False)
    assert by_table.number < 0.95 * by_fronts.number and by_table.num_preempted.sum() == 0


def test_requests_begin_when_it_is_their_time() -> None:
    lengths = make_lengths(0)
    table = timetable_of(lengths)
    assert table is not None
    begun: dict[int, int] = {}
    for number, step in enumerate(planned_steps(lengths, lengths.output_tokens)):
        for chunk in step.batch.prefills:
            begun.setdefault(chunk.request.position, number)
    timed = np.flatnonzero(~table.is_flexible)
    late = np.array([begun[position] for position in timed.tolist()]) - table.starts[timed]
    assert len(timed) > 50 and late.max() <= 2


def test_steps_compute_evenly_whatever_decodes() -> None:
    """Few requests decode long, while many prompts that generate little are computed, 700 tokens a step in all."""
    lengths = many_prompts()
    steps = run(lengths, lengths.output_tokens, num_blocks=900, step_tokens=4096)
    tokens = (steps.num_decodes + steps.num_prefill_tokens)[5 : int(0.9 * steps.number)]
    decodes = steps.num_decodes[: len(tokens)]
    assert decodes.max() > 2 * decodes.min()
    assert (np.abs(tokens - tokens.mean()) <= 128).mean() > 0.95
    assert (tokens % 128 == 0).mean() > 0.9, "steps are padded to so many anyway"


def test_another_source_may_follow_where_steps_are_full_without_it() -> None:
    """Where they aren't, both fronts leave room for the next source's requests beside the last ones of this."""
    light = make_lengths(1, 80)
    by_fronts = run(light, light.output_tokens, has_timetable=False)
    assert run(light, light.output_tokens, is_last=False).number == by_fronts.number
    assert run(light, light.output_tokens).number < by_fronts.number
    heavy = many_prompts()
    alone, followed = (
        run(heavy, heavy.output_tokens, num_blocks=900, step_tokens=4096, is_last=is_last) for is_last in (True, False)
    )
    assert alone.num_prefill_tokens.tolist() == followed.num_prefill_tokens.tolist()


def test_where_lengths_are_wrong_prompts_do_not_starve() -> None:
    lengths = many_prompts()
    right = run(lengths, lengths.output_tokens, num_blocks=900, step_tokens=4096)
    for factor in (0.7, 1.3):
        actual = np.maximum((lengths.output_tokens * factor).astype(np.int64), 1)
        wrong = run(lengths, actual, num_blocks=900, step_tokens=4096)
        assert wrong.number <= 1.35 * right.number


def test_what_shares_a_prompt_stays_together() -> None:
    lengths = make_lengths(2)
    shared = np.zeros(150, dtype=np.int64)
    shared[121:135] = 60
    prompt_tokens = np.maximum(lengths.prompt_tokens, 64)
    lengths = KnownLengths(prompt_tokens, lengths.output_tokens, shared)
    assert np.flatnonzero(lengths.is_shared).tolist() == list(range(120, 135))
    table = timetable_of(lengths)
    assert table is not None
    assert [position for position in table.order.tolist() if 120 <= position < 135] == list(range(134, 119, -1))


@pytest.mark.parametrize("factor", [0.1, 0.5, 2.0])
def test_wrong_lengths_end_a_timetable_and_lose_nothing(factor: float) -> None:
    stated = make_lengths(3)
    actual = np.clip((stated.output_tokens * factor).astype(np.int64), 1, 300)
    by_table, by_fronts = run(stated, actual), run(stated, actual, has_timetable=False)
    assert by_table.number <= 1.15 * by_fronts.number


def test_none_is_made_where_steps_and_cache_say_nothing_or_it_does_not_fit() -> None:
    prompt, output = np.append(np.full(400, 100), 8), np.append(np.ones(400, np.int64), 120)
    assert timetable_of(KnownLengths(prompt, output, 0 * prompt)) is None, "steps are full, and the cache has room"
    nothing = np.zeros(0, dtype=np.int64)
    assert timetable_of(KnownLengths(nothing, nothing, nothing)) is None
    ones = np.ones(150, dtype=np.int64)
    assert timetable_of(KnownLengths(50 * ones, ones, 0 * ones)) is None
    assert timetable_of(KnownLengths(2 * CAPACITY * ones, 300 * ones, 0 * ones)) is None


def with_many_labels(num_labels: int) -> KnownLengths:
    """A few requests that decode for long, and labels under one long prompt: each computes 20 tokens of 200."""
    random = np.random.default_rng(0)
    prompt = np.concatenate((np.full(num_labels, 200), np.full(60, 8)))
    output = np.concatenate((np.ones(num_labels, np.int64), random.integers(250, 300, 60)))
    shared = np.concatenate((np.full(num_labels, 180), np.zeros(60, np.int64)))
    return KnownLengths(prompt, output, shared)


def test_requests_that_share_prompts_and_end_at_once_take_no_room_from_others() -> None:
    alone, beside = timetable_of(with_many_labels(0)), timetable_of(with_many_labels(6000))
    assert alone is not None and beside is not None
    assert beside.num_steps <= 1.2 * max(alone.num_steps, 6000 * 20 // STEP_TOKENS)


def test_prompts_are_spread_over_a_long_output_that_has_room() -> None:
    """Else all prompts would come first, and then steps that have little to compute."""
    prompt, output = np.concatenate((np.full(2000, 100), np.full(3, 8))), np.concatenate((np.full(2000, 4), [999] * 3))
    lengths = KnownLengths(prompt, output, np.zeros(2003, np.int64))
    steps = run(lengths, output, num_blocks=4000, step_tokens=4096)
    assert steps.number <= 1010
    assert (steps.num_prefill_tokens > 0).mean() > 0.38, "the least that a step computes is 512 tokens"
