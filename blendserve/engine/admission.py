"""What waits, and which of it may be admitted next: preempted requests first, then what stands at either front."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from blendserve.admission_rate import READMITTED_SHARE
from blendserve.dual_scanner import Front
from blendserve.engine.kv_cache import KVCache
from blendserve.engine.memory_forecast import MemoryForecast
from blendserve.engine.pace import Pace
from blendserve.engine.request import Request
from blendserve.engine.upcoming import UpcomingRequests
from blendserve.timetable import Timetable


class Candidate(NamedTuple):
    """A request that may be admitted if the KV cache is expected to hold no more than `room_tokens` with it.

    front: where it stands; None: it was preempted.
    """

    request: Request
    front: Front | None
    room_tokens: float


# Of the right front's share of the cache, counted by what requests hold on average. With 0.2 to 0.4 the four traces at
# two minutes take 97.8 to 103.9 s on a simulated H100; with 0.5, where it bounds nothing any more, 102.0 to 104.7.
_FIRST_SHARE = 0.35


# What waits last, if it is no more than this share of the cache, may outgrow the cache by as much: what is preempted
# then is computed again in tens of milliseconds, and would else begin when much of the rest has ended. With 440,000 to
# 481,000 tokens of cache the four traces at two minutes take 98 to 102 s on a simulated H100, up to 105 s without this.
_LAST_SHARE = 0.2

# A timetable is kept as long as lengths are wrong by no more than this share of them, after the first 32 requests. With
# lengths 30 % off it is still better than both fronts by 1-2 %, with those all taken to be the same worse by up to 4 %.
_ENDED = 32
_MISSED = 0.4

log = logging.getLogger(__name__)


class _RightShare:
    """How much of its share of the cache the right front may fill yet: a part at once, all within a request's life.

    Filled in one go, long requests would all grow together, leave half of the cache unused at first and all of it when
    they end together; and the left front would have to wait for each of them.
    """

    def __init__(self) -> None:
        self._allowed_tokens = self._most_tokens = math.inf

    def grow(self, share_tokens: float, next_request: Request) -> None:
        """A step has passed; `next_request` stands at the front."""
        self._most_tokens = _FIRST_SHARE * share_tokens
        allowed = self._allowed_tokens + share_tokens / next_request.remaining_output_tokens
        self._allowed_tokens = min(allowed, self._most_tokens)

    def allows(self, request: Request) -> bool:
        """Whether `request` may be admitted; one larger than the whole part, when all of that is left."""
        return self._allowed_tokens >= min(request.footprint_tokens, self._most_tokens)

    def take(self, request: Request) -> None:
        self._allowed_tokens -= request.footprint_tokens


def reason_against(request: Request, max_model_len: int, kv_cache: KVCache) -> str | None:
    """Why a request can never run, or None."""
    num_tokens = request.num_prompt_tokens
    if num_tokens == 0:
        return "the prompt is empty: it has no tokens"
    if num_tokens >= max_model_len:
        return (
            f"the prompt has {num_tokens} tokens; with at least one for the completion the context of "
            f"{max_model_len} tokens is exceeded"
        )
    if kv_cache.blocks_for(num_tokens) > kv_cache.num_blocks:
        capacity_tokens = kv_cache.num_blocks * kv_cache.block_size
        return f"the prompt has {num_tokens} tokens; the KV cache holds {capacity_tokens}. Raise num_blocks"
    return None


class AdmissionOrder:
    """Requests of a source that wait, and those that were preempted."""

    def __init__(
        self,
        upcoming: UpcomingRequests,
        pace: Pace | None,
        max_num_batched_tokens: int,
        timetable: Timetable | None = None,
    ) -> None:
        """pace: what says which front lacks work; without one each front has its share of the cache. timetable: when
        each request should begin; at the left front are its flexible ones then, at the right one the others.
        """
        self._upcoming = upcoming
        self._scanner = upcoming.scanner
        self._pace = pace
        self._max_num_batched_tokens = max_num_batched_tokens
        self._preempted: deque[Request] = deque()
        self._right_share = _RightShare()
        self._timetable = timetable
        self._num_ended = self._expected_tokens = self._missed_tokens = 0
        self._tokens_left = 0  # that steps have to compute of what waits, by the timetable
        if timetable is not None:
            self._scanner.follow(timetable.order)
            self._computed_tokens = timetable.lengths.computed_tokens
            self._tokens_left = int(self._computed_tokens.sum())

    @property
    def num_waiting(self) -> int:
        return self._scanner.num_remaining + len(self._preempted)

    def put_back(self, request: Request) -> None:
        """Let a request that was preempted come first."""
        request.num_preemptions += 1
        self._preempted.appendleft(request)

    def clear(self) -> None:
        """Forget the preempted requests."""
        self._preempted.clear()

    def take(self, candidate: Candidate) -> None:
        """Take a candidate out of what waits."""
        if candidate.front is None:
            self._preempted.popleft()
            return
        if candidate.front is Front.RIGHT:
            self._right_share.take(candidate.request)
        candidate.request.front = candidate.front
        if self._timetable is not None:
            self._tokens_left -= int(self._computed_tokens[candidate.request.position])
        self._upcoming.take(candidate.front)

    def note_end(self, request: Request, num_generated: int) -> None:
        """A request has ended. Where many end at another time than they should have, the timetable is given up."""
        if self._timetable is None:
            return
        self._num_ended += 1
        self._expected_tokens += request.estimated_output_tokens
        self._missed_tokens += abs(request.estimated_output_tokens - num_generated)
        if self._num_ended >= _ENDED and self._missed_tokens > _MISSED * self._expected_tokens:
            log.info("Output lengths are not what was planned with: the shard goes on from both fronts.")
            self._timetable = None
            self._scanner.go_on_from_both_ends()

    def begin_step(self, capacity_tokens: int) -> None:
        """Before the `candidates` of each step."""
        if self._scanner.is_two_ended and self._scanner.num_remaining:
            share = 1.0 - self._scanner.left_share
            self._right_share.grow(share * capacity_tokens, self._upcoming.peek(Front.RIGHT))

    def candidates(
        self, forecast: MemoryForecast, capacity_tokens: int, *, step: int, prefill_budget: int
    ) -> Iterator[Candidate]:
        """What may be admitted next, the best first.

        prefill_budget: prompts' tokens that this step may still have. By the timetable, flexible requests are admitted
        with one and all others without.
        """
        if self._preempted:
            is_two_ended = self._scanner.is_two_ended
            room = capacity_tokens * READMITTED_SHARE if is_two_ended else capacity_tokens
            yield Candidate(self._preempted[0], None, room)
            if is_two_ended and self._scanner.num_remaining and prefill_budget > 0:
                yield self._at(Front.LEFT, capacity_tokens)  # runs in the room that is too small for the first
            return
        if self._scanner.num_remaining == 0:
            return
        if self._timetable is not None:
            front = self._front_by_timetable(self._timetable, forecast, step, prefill_budget)
            if front is not None:
                yield self._at(front, capacity_tokens)
            return
        by_rate = self._pace and self._fronts_by_rate(self._pace, forecast, capacity_tokens)
        for front in by_rate or self._fronts_by_memory(forecast, capacity_tokens):
            if front is Front.RIGHT or prefill_budget > 0:
                most = self._scanner.max_held_tokens(front, capacity_tokens)
                yield self._at(front, most if by_rate else self._room(capacity_tokens))

    @property
    def has_timetable(self) -> bool:
        return self._timetable is not None

    def step_tokens(self, step: int, num_unfinished: int) -> int:
        """How many tokens this step should compute by the timetable; 0 without one.

        num_unfinished: tokens of what runs, to be computed yet.
        """
        return self._timetable.step_tokens(step, self._tokens_left + num_unfinished) if self._timetable else 0

    def _front_by_timetable(
        self, table: Timetable, forecast: MemoryForecast, step: int, prefill_budget: int
    ) -> Front | None:
        """Which front's next request may begin now: a flexible one as far as there is a budget for its prompt, another
        where there is none and its time has come, or nothing else is left to do.
        """
        flexible, timed = self._scanner.peek(Front.LEFT), self._scanner.peek(Front.RIGHT)
        if prefill_budget > 0:
            return Front.LEFT if table.is_flexible[flexible] else None
        if table.is_flexible[timed]:
            return None
        is_idle = forecast.is_empty and not table.is_flexible[flexible]
        return Front.RIGHT if is_idle or table.is_due(timed, step, forecast.held_tokens) else None

    def _room(self, capacity_tokens: int) -> float:
        """What running requests may be expected to hold at most."""
        is_last = self._scanner.is_two_ended and self._upcoming.waiting_tokens <= _LAST_SHARE * capacity_tokens
        return capacity_tokens * (1 + _LAST_SHARE) if is_last else capacity_tokens

    def _fronts_by_rate(self, pace: Pace, forecast: MemoryForecast, capacity_tokens: int) -> Iterator[Front]:
        """The left front, as long as its share of this step lasts; the right one while steps lack memory work."""
        request = self._upcoming.peek(Front.RIGHT)
        right_tokens = forecast.footprint_tokens[Front.RIGHT] + request.footprint_tokens
        is_full = forecast.unprefilled_tokens >= self._max_num_batched_tokens
        if not is_full and pace.lacks_memory_work(right_tokens, capacity_tokens):
            yield Front.RIGHT
        yield Front.LEFT

    def _fronts_by_memory(self, forecast: MemoryForecast, capacity_tokens: int) -> Iterator[Front]:
        """The front that is furthest under its share of the cache; the left one, while the right has filled its part.

        Long requests from the right wait until much of the cache is free. Meanwhile the left goes on, as far as its
        share and one step's prefill reach: otherwise the step would have memory work only, and beyond that the right
        would never find room.
        """
        scanner, held = self._scanner, forecast.footprint_tokens
        front = scanner.next_front(held[Front.LEFT], held[Front.RIGHT], capacity_tokens)
        if front is None:
            return
        if front is Front.RIGHT and not self._right_share.allows(self._upcoming.peek(Front.RIGHT)):
            yield Front.LEFT
            return
        yield front
        if front is Front.RIGHT:
            most = scanner.left_share * capacity_tokens + self._max_num_batched_tokens
            if held[Front.LEFT] < most:
                yield Front.LEFT

    def _at(self, front: Front, room_tokens: float) -> Candidate:
        return Candidate(self._upcoming.peek(front), front, room_tokens)
