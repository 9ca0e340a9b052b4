"""The scheduler against a memory that remembers what was stored in each slot: every token sees exactly its own past."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blendserve.engine.kv_cache import KVCache
from blendserve.engine.request import Request
from blendserve.engine.scheduler import ScheduledBatch, Scheduler
from tests.engine.engine_runs import ListSource, stated_requests

BLOCK_SIZE = 4


class RememberedSlots:
    """What each KV cache slot holds: the tokens up to and including the one stored there."""

    def __init__(self) -> None:
        self._slots: dict[int, tuple[int, ...]] = {}

    def run(self, batch: ScheduledBatch) -> None:
        chunks = [(request, request.num_computed_tokens, 1) for request in batch.decodes]
        chunks += [(chunk.request, chunk.request.num_computed_tokens, chunk.num_tokens) for chunk in batch.prefills]
        written: set[int] = set()
        for request, start, length in chunks:
            tokens = request.token_slice(0, request.num_tokens).tolist()
            for position in range(start, start + length):
                slot = self._slot(request, position)
                assert slot not in written, "two tokens of one step share a slot"
                written.add(slot)
                self._slots[slot] = tuple(tokens[: position + 1])
        for request, start, length in chunks:
            tokens = request.token_slice(0, request.num_tokens).tolist()
            for position in range(start + length):
                assert self._slots[self._slot(request, position)] == tuple(tokens[: position + 1])

    def _slot(self, request: Request, position: int) -> int:
        return request.block_table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE


def take_step(scheduler: Scheduler, batch: ScheduledBatch) -> list[Request]:
    """What the engine does after a step; the next token is always 1. Returns the finished requests."""
    sampled = batch.sampled
    for request in batch.decodes:
        request.num_computed_tokens += 1
    for chunk in batch.prefills:
        chunk.request.num_computed_tokens += chunk.num_tokens
    for request in sampled:
        request.output_token_ids.append(1)
    finished = [request for request in sampled if len(request.output_token_ids) == request.max_tokens]
    for request in finished:
        scheduler.finish(request)
    return finished


REQUESTS = st.lists(
    st.tuples(st.lists(st.integers(0, 1), max_size=30), st.integers(1, 20), st.integers(1, 20)), max_size=14
)


@settings(max_examples=150, deadline=None)
@given(
    requests=REQUESTS,
    num_blocks=st.integers(2, 24),
    max_num_seqs=st.integers(1, 6),
    budget=st.integers(1, 40),
    has_prefix_cache=st.booleans(),
    is_two_ended=st.booleans(),
)
def test_every_request_runs_once_and_sees_its_own_past(
    requests: list[tuple[list[int], int, int]],
    num_blocks: int,
    max_num_seqs: int,
    budget: int,
    has_prefix_cache: bool,
    is_two_ended: bool,
) -> None:
    stated: list[dict[str, Any]] = [
        {"row_index": row, "prompt_token_ids": prompt, "max_tokens": tokens, "estimated_output_tokens": estimate}
        for row, (prompt, tokens, estimate) in enumerate(requests)
    ]
    cache = KVCache(num_blocks, BLOCK_SIZE, has_prefix_cache)
    scheduler = Scheduler(
        ListSource(stated, is_two_ended=is_two_ended),
        cache,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=48,
    )
    slots, ended, num_steps = RememberedSlots(), [], 0
    while scheduler.has_unfinished:
        batch = scheduler.schedule()
        num_steps += 1
        assert batch.num_tokens <= budget and len(scheduler.running) <= max_num_seqs
        assert batch.num_tokens > 0 or batch.failed, "a step without progress"
        cache.check_integrity(scheduler.running)
        slots.run(batch)
        ended += [(request.row_index, "failed") for request, _ in batch.failed]
        ended += [(request.row_index, "done") for request in take_step(scheduler, batch)]
        assert num_steps < 5000
    fits = {row for row, (prompt, tokens, _) in enumerate(requests) if _fits(prompt, tokens, num_blocks)}
    assert sorted(row for row, _ in ended) == list(range(len(requests)))
    assert {row for row, outcome in ended if outcome == "done"} == fits
    cache.check_integrity(())
    assert cache.num_used_blocks == 0


def _fits(prompt: list[int], max_tokens: int, num_blocks: int) -> bool:
    """Whether a request alone fits the cache up to its last token, which is sampled but never stored."""
    return 0 < len(prompt) < 48 and len(prompt) + min(max_tokens, 48 - len(prompt)) - 1 <= num_blocks * BLOCK_SIZE


def run_to_end(scheduler: Scheduler) -> list[ScheduledBatch]:
    batches = []
    while scheduler.has_unfinished:
        batches.append(scheduler.schedule())
        take_step(scheduler, batches[-1])
    return batches


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


def test_the_last_token_of_a_known_prompt_is_computed_for_its_logits() -> None:
    batches = run_to_end(make_scheduler([list(range(8))] * 3))
    assert [chunk.num_tokens for chunk in batches[0].prefills] == [8, 4, 4]


def test_requests_that_are_expected_to_fill_the_cache_are_not_admitted_together() -> None:
    prompts = [[number] * 8 for number in range(4)]
    scheduler = make_scheduler(prompts, max_tokens=24, num_blocks=16)  # 64 tokens: two requests of 32 at most
    batches = run_to_end(scheduler)
    assert len(batches[0].prefills) == 2
    assert sum(batch.num_preempted for batch in batches) == 0


def test_a_wrong_estimate_preempts_the_latest_admitted() -> None:
    prompts = [[number] * 8 for number in range(4)]
    scheduler = make_scheduler(prompts, max_tokens=24, num_blocks=16, estimated_output_tokens=1)
    finished: list[int] = []
    num_preempted = 0
    while scheduler.has_unfinished:
        batch = scheduler.schedule()
        num_preempted += batch.num_preempted
        finished += [request.row_index for request in take_step(scheduler, batch)]
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
    while scheduler.has_unfinished:
        batch = scheduler.schedule()
        assert batch.num_preempted == 0
        finished += [request.row_index for request in take_step(scheduler, batch)]
    assert finished.index(14) < finished.index(13) < finished.index(12)  # the long ones, from the right end
    assert finished.index(14) >= 6  # short ones ran beside the first long one


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
