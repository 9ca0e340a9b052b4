"""The scheduler against a memory that remembers what was stored in each slot: every token sees exactly its own past."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.dry_run import DryRun
from blendserve.dual_scanner import DualScanner
from blendserve.engine.kv_cache import KVCache
from blendserve.engine.scheduled_batch import ScheduledBatch
from blendserve.engine.scheduler import Scheduler
from tests.engine.engine_runs import ListSource, stated_requests

BLOCK_SIZE = 4


class RememberedSlots:
    """What each KV cache slot holds: the tokens up to and including the one stored there.

    Sees a batch as a runner does, through table changes and rows; every sampled token is 1.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self._tables: list[dict[int, int]] = [{} for _ in range(max_num_seqs)]
        self._tokens: list[list[int]] = [[] for _ in range(max_num_seqs)]  # by row, as far as they are known there
        self._slots: dict[int, tuple[int, ...]] = {}

    def run(self, batch: ScheduledBatch) -> None:
        for change in batch.table_changes:
            self._tables[change.row].update(enumerate(change.blocks, start=change.first))
        targets = [copy.target for copy in batch.block_copies]  # a GPU makes all copies at one time
        assert len(set(targets)) == len(targets) and not set(targets) & {copy.source for copy in batch.block_copies}
        for copy in batch.block_copies:
            for offset in range(copy.num_tokens):
                self._slots[copy.target * BLOCK_SIZE + offset] = self._slots[copy.source * BLOCK_SIZE + offset]
        chunks = [*zip(batch.decode_rows.tolist(), batch.decode_positions.tolist(), itertools.repeat(1))]
        for chunk in batch.prefills:
            self._tokens[chunk.row] = chunk.request.token_slice(0, chunk.request.num_tokens).tolist()
            chunks.append((chunk.row, chunk.start, chunk.num_tokens))
        written: set[int] = set()
        for row, start, length in chunks:
            for position in range(start, start + length):
                slot = self._slot(row, position)
                assert slot not in written, "two tokens of one step share a slot"
                written.add(slot)
                self._slots[slot] = tuple(self._tokens[row][: position + 1])
        for row, start, length in chunks:
            for position in range(start + length):
                assert self._slots[self._slot(row, position)] == tuple(self._tokens[row][: position + 1])
        for row in batch.sampled_rows.tolist():
            self._tokens[row].append(1)

    def _slot(self, row: int, position: int) -> int:
        return self._tables[row][position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE


# Prompts, limits, estimates, and after how many tokens each ends, if its limit allows.
REQUESTS = st.lists(
    st.tuples(st.lists(st.integers(0, 1), max_size=30), st.integers(1, 20), st.integers(1, 20), st.integers(1, 20)),
    max_size=14,
)


@settings(max_examples=150, deadline=None)
@given(
    requests=REQUESTS,
    num_blocks=st.integers(2, 24),
    max_num_seqs=st.integers(1, 6),
    budget=st.integers(1, 40),
    has_prefix_cache=st.booleans(),
    is_two_ended=st.booleans(),
    pace=st.sampled_from([(None, 0), (1, 30), (12, 0)]),
    lag=st.integers(0, 1),
)
def test_every_request_runs_once_and_sees_its_own_past(
    requests: list[tuple[list[int], int, int, int]],
    num_blocks: int,
    max_num_seqs: int,
    budget: int,
    has_prefix_cache: bool,
    is_two_ended: bool,
    pace: tuple[int | None, int],
    lag: int,
) -> None:
    """pace: paced_tokens and weights_tokens. lag: steps that are planned before a step's tokens are known."""
    stated: list[dict[str, Any]] = [
        {"row_index": row, "prompt_token_ids": prompt, "max_tokens": tokens, "estimated_output_tokens": estimate}
        for row, (prompt, tokens, estimate, _) in enumerate(requests)
    ]
    cache = KVCache(num_blocks, BLOCK_SIZE, has_prefix_cache, min_copied_tokens=1)
    scheduler = Scheduler(
        ListSource(stated, is_two_ended=is_two_ended),
        cache,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=48,
        paced_tokens=pace[0],
        weights_tokens=pace[1],
    )
    run = DryRun(scheduler, lambda request: requests[request.row_index][3])
    slots, num_steps = RememberedSlots(max_num_seqs), 0
    ended: list[tuple[int, str]] = []
    in_flight: list[ScheduledBatch] = []
    while scheduler.has_unfinished:
        batch = scheduler.schedule()
        num_steps += 1
        assert batch.num_tokens <= budget and scheduler.running.num_rows <= max_num_seqs
        assert batch.num_tokens > 0 or batch.failed or in_flight, "a step without progress"
        cache.check_integrity(request for request in scheduler.running.requests if request is not None)
        slots.run(batch)
        ended += [(request.row_index, "failed") for request, _ in batch.failed]
        in_flight.append(batch)
        while len(in_flight) > lag or (in_flight and batch.num_tokens == 0):
            ended += [(request.row_index, "done") for request in run.take_tokens(in_flight.pop(0))]
        assert num_steps < 5000
    fits = {
        row for row, (prompt, limit, _, length) in enumerate(requests) if _fits(prompt, min(limit, length), num_blocks)
    }
    assert sorted(row for row, _ in ended) == list(range(len(requests)))
    assert {row for row, outcome in ended if outcome == "done"} == fits
    cache.check_integrity(())
    assert cache.num_used_blocks == 0


def test_a_request_whose_last_token_is_on_its_way_does_not_outgrow_the_cache() -> None:
    scheduler = make_scheduler([[1] * 8], max_tokens=20, num_blocks=3)  # room for all tokens but the fifth, its last
    run, in_flight = DryRun(scheduler, lambda _: 5), [scheduler.schedule()]
    ended: list[int] = []
    while scheduler.has_unfinished:
        batch = scheduler.schedule()
        assert not batch.failed
        in_flight.append(batch)
        ended += [len(request.output_token_ids) for request in run.take_tokens(in_flight.pop(0))]
    assert ended == [5]


def _fits(prompt: list[int], num_output_tokens: int, num_blocks: int) -> bool:
    """Whether a request alone fits the cache up to its last token, which is sampled but never stored."""
    return (
        0 < len(prompt) < 48 and len(prompt) + min(num_output_tokens, 48 - len(prompt)) - 1 <= num_blocks * BLOCK_SIZE
    )


def run_to_end(scheduler: Scheduler) -> list[ScheduledBatch]:
    return [step.batch for step in DryRun(scheduler).steps()]


def make_scheduler(prompts: list[list[int]], max_tokens: int = 3, **settings: Any) -> Scheduler:
    defaults = {"max_num_seqs": 16, "max_num_batched_tokens": 512, "max_model_len": 256}
    cache = KVCache(settings.pop("num_blocks", 128), BLOCK_SIZE, has_prefix_cache=True)
    more = {key: settings.pop(key) for key in ("estimated_output_tokens",) if key in settings}
    source = ListSource(stated_requests(prompts, max_tokens, **more))
    return Scheduler(source, cache, **{**defaults, **settings})


def test_a_prefix_is_computed_once_even_within_one_step() -> None:
    prefix = list(range(40))
    scheduler = make_scheduler([[*prefix, 100 + number] for number in range(8)])
    batches = run_to_end(scheduler)
    assert batches[0].num_prefill_tokens == 40 + 8
    assert sum(batch.num_prefill_tokens for batch in batches) == 40 + 8
    assert batches[0].num_cached_tokens == 7 * 40


def test_a_prefix_is_computed_once_when_it_takes_several_steps() -> None:
    prefix = list(range(40))
    batches = run_to_end(make_scheduler([[*prefix, 100 + number] for number in range(8)], max_num_batched_tokens=11))
    assert sum(batch.num_prefill_tokens for batch in batches) == 40 + 8


def test_a_prefix_that_ends_within_a_block_is_computed_once_too() -> None:
    prompts = [[*range(9), 100 + number, 200 + number] for number in range(6)]
    cache = KVCache(64, 8, has_prefix_cache=True, min_copied_tokens=1)
    settings: dict[str, Any] = {"max_num_seqs": 16, "max_num_batched_tokens": 512, "max_model_len": 256}
    batches = run_to_end(Scheduler(ListSource(stated_requests(prompts, 3)), cache, **settings))
    # The others wait a step for the first one's block, and begin theirs with a copy of its one token.
    assert [len(batch.prefills) for batch in batches[:2]] == [1, 5]
    assert [len(batch.block_copies) for batch in batches[:2]] == [0, 5]
    assert sum(batch.num_prefill_tokens for batch in batches) == 9 + 6 * 2


def test_a_short_prompt_is_copied_while_its_completion_goes_on() -> None:
    cache = KVCache(64, 32, has_prefix_cache=True)
    settings: dict[str, Any] = {"max_num_seqs": 16, "max_num_batched_tokens": 512, "max_model_len": 256}
    prompts = [[*range(20), 100 + number] for number in range(4)]
    batches = run_to_end(Scheduler(ListSource(stated_requests(prompts, 9)), cache, **settings))
    assert sum(batch.num_prefill_tokens for batch in batches) == 20 + 4
    assert sum(batch.num_cached_tokens for batch in batches) == 3 * 20


def test_the_last_token_of_a_known_prompt_is_computed_for_its_logits() -> None:
    batches = run_to_end(make_scheduler([list(range(8))] * 3))
    assert [chunk.num_tokens for chunk in batches[0].prefills] == [8, 4, 4]


def test_requests_that_are_expected_to_fill_the_cache_are_not_admitted_together() -> None:
    prompts = [[number] * 8 for number in range(4)]
    scheduler = make_scheduler(prompts, max_tokens=24, num_blocks=18)  # 72 tokens: two requests of 32 at most
    batches = run_to_end(scheduler)
    assert len(batches[0].prefills) == 2
    assert sum(batch.num_preempted for batch in batches) == 0


def test_a_wrong_estimate_preempts_the_latest_admitted() -> None:
    prompts = [[number] * 8 for number in range(4)]
    scheduler = make_scheduler(prompts, max_tokens=24, num_blocks=16, estimated_output_tokens=1)
    finished: list[int] = []
    num_preempted = 0
    for step in DryRun(scheduler).steps():
        num_preempted += step.batch.num_preempted
        finished += [request.row_index for request in step.ended]
    assert num_preempted > 0
    assert finished == [0, 1, 2, 3]


def test_the_left_front_goes_on_while_the_right_one_waits_for_room() -> None:
    short, long = [[number] * 8 for number in range(12)], [[50 + number] * 8 for number in range(3)]
    stated = stated_requests([*short, *long], 2)
    for request in stated[len(short) :]:
        request["max_tokens"] = request["estimated_output_tokens"] = 40
    cache = KVCache(16, BLOCK_SIZE, has_prefix_cache=True)  # 64 tokens: one long request and two short ones
    scheduler = Scheduler(
        ListSource(stated, is_two_ended=True), cache, max_num_seqs=16, max_num_batched_tokens=16, max_model_len=256
    )
    finished: list[int] = []
    for step in DryRun(scheduler).steps():
        assert step.batch.num_preempted == 0
        finished += [request.row_index for request in step.ended]
    assert finished.index(14) < finished.index(13) < finished.index(12)  # the long ones, from the right end
    assert finished.index(14) >= 6  # short ones ran beside the first long one


@pytest.mark.parametrize(("num_requests", "num_steps", "num_preempted"), [(8, 40, 0), (9, 43, 1), (12, 80, 0)])
def test_the_last_request_need_not_wait_for_room_that_it_lacks_at_its_end_only(
    num_requests: int, num_steps: int, num_preempted: int
) -> None:
    stated = stated_requests([[number] * 8 for number in range(num_requests)], 40)
    cache = KVCache(100, BLOCK_SIZE, has_prefix_cache=True)  # 400 tokens: eight requests of 48, twelve are too many
    source = ListSource(stated, is_two_ended=True)
    scheduler = Scheduler(source, cache, max_num_seqs=32, max_num_batched_tokens=512, max_model_len=256)
    batches = run_to_end(scheduler)
    assert len(batches) == num_steps
    assert sum(batch.num_preempted for batch in batches) == num_preempted


@pytest.mark.parametrize(("paced_tokens", "expected"), [(None, (3, 2048 - 20)), (1, (100, 15)), (800, (100, 9))])
def test_a_paced_left_front_lasts_as_long_as_the_right_ones_decodes(
    paced_tokens: int | None, expected: tuple[int, int]
) -> None:
    prompts = [[number] * 40 for number in range(200)]
    stated = stated_requests(prompts, 1)
    for request in stated[180:]:
        request["max_tokens"] = request["estimated_output_tokens"] = 100
    source = ListSource(stated, is_two_ended=True)
    # A token takes a second, a read a twentieth of one.
    is_right = np.arange(200) >= 180
    source.scanner = DualScanner(
        compute_seconds=np.where(is_right, 140.0, 41.0),
        memory_seconds=np.where(is_right, 450.0, 2.0),
        unit_density=np.where(is_right, 0.3, 20.0),
        is_two_ended=True,
    )
    cache = KVCache(2000, BLOCK_SIZE, has_prefix_cache=True)
    scheduler = Scheduler(
        source,
        cache,
        max_num_seqs=256,
        max_num_batched_tokens=2048,
        max_model_len=256,
        paced_tokens=paced_tokens,
        weights_tokens=600,
    )
    batches = run_to_end(scheduler)
    prefilled = [batch.num_prefill_tokens for batch in batches]
    assert sum(prefilled) == 200 * 40
    last_step = max(index for index, num_tokens in enumerate(prefilled) if num_tokens)
    # Without a pace the first steps take all they can. The weights take as long as 30 tokens, 20 of them decodes.
    assert (last_step, prefilled[1]) == expected
    assert all(tokens <= 10 or tokens >= (paced_tokens or 0) for tokens in prefilled[1:last_step])


@pytest.mark.parametrize(("is_two_ended", "num_kept_tokens"), [(True, 32), (False, 0)])
def test_a_prefix_that_a_front_will_need_is_spared(is_two_ended: bool, num_kept_tokens: int) -> None:
    prefix = list(range(32))
    cache = KVCache(20, BLOCK_SIZE, has_prefix_cache=True)
    settings: dict[str, Any] = {"max_num_seqs": 1, "max_num_batched_tokens": 64, "max_model_len": 256}
    run_to_end(Scheduler(ListSource(stated_requests([[*prefix, 99]], 1)), cache, **settings))
    # Forty requests that share nothing, each taking a third of the cache, and the prefix again at the right end.
    stated = stated_requests([[100 + number] * 24 for number in range(40)] + [[*prefix, 98]], 3)
    batches = run_to_end(Scheduler(ListSource(stated, is_two_ended=is_two_ended), cache, **settings))
    assert sum(batch.num_cached_tokens for batch in batches) == num_kept_tokens
