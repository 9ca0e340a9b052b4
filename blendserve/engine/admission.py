"""What waits, and which of it may be admitted next: preempted requests first, then what stands at either front."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from blendserve.admission_rate import READMITTED_SHARE
from blendserve.dual_scanner import Front
from blendserve.engine.memory_forecast import MemoryForecast
from blendserve.engine.pace import Pace
from blendserve.engine.request import Request
from blendserve.engine.upcoming import UpcomingRequests


class Candidate(NamedTuple):
    """A request that may be admitted if the KV cache is expected to hold no more than `room_tokens` with it.

    front: where it stands; None: it was preempted.
    """

    request: Request
    front: Front | None
    room_tokens: float


class AdmissionOrder:
    """Requests of a source that wait, and those that were preempted."""

    def __init__(self, upcoming: UpcomingRequests, pace: Pace | None, max_num_batched_tokens: int) -> None:
        """pace: what says which front lacks work; without one each front has its share of the cache."""
        self._upcoming = upcoming
        self._scanner = upcoming.scanner
        self._pace = pace
        self._max_num_batched_tokens = max_num_batched_tokens
        self._preempted: deque[Request] = deque()

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
        candidate.request.front = candidate.front
        self._upcoming.take(candidate.front)

    def candidates(self, forecast: MemoryForecast, capacity_tokens: int, prefill_budget: int) -> Iterator[Candidate]:
        """What may be admitted next, the best first. prefill_budget: tokens of
        prompts that this step may still have."""
        if self._preempted:
            is_two_ended = self._scanner.is_two_ended
            room = capacity_tokens * READMITTED_SHARE if is_two_ended else capacity_tokens
            yield Candidate(self._preempted[0], None, room)
            if is_two_ended and self._scanner.num_remaining and prefill_budget > 0:
                yield self._at(Front.LEFT, capacity_tokens)  # runs in the room that is too small for the first
            return
        if self._scanner.num_remaining == 0:
            return
        by_rate = self._pace and self._fronts_by_rate(self._pace, forecast, capacity_tokens)
        for front in by_rate or self._fronts_by_memory(forecast, capacity_tokens):
            if front is Front.RIGHT or prefill_budget > 0:
                room = self._scanner.max_held_tokens(front, capacity_tokens) if by_rate else capacity_tokens
                yield self._at(front, room)

    def _fronts_by_rate(self, pace: Pace, forecast: MemoryForecast, capacity_tokens: int) -> Iterator[Front]:
        """The left front, as long as its share of this step lasts; the right one while steps lack memory work."""
        request = self._upcoming.peek(Front.RIGHT)
        footprint = request.num_tokens + request.remaining_output_tokens / 2
        is_full = forecast.unprefilled_tokens >= self._max_num_batched_tokens
        if not is_full and pace.lacks_memory_work(forecast.footprint_tokens[Front.RIGHT] + footprint, capacity_tokens):
            yield Front.RIGHT
        yield Front.LEFT

    def _fronts_by_memory(self, forecast: MemoryForecast, capacity_tokens: int) -> Iterator[Front]:
        """The front that is furthest under its share of the cache.

        Long requests from the right wait until much of the cache is free. Meanwhile the left goes on, as far as its
        share and one step's prefill reach: otherwise the step would have memory work only, and beyond that the right
        would never find room.
        """
        scanner, held = self._scanner, forecast.footprint_tokens
        front = scanner.next_front(held[Front.LEFT], held[Front.RIGHT], capacity_tokens)
        if front is None:
            return
        yield front
        if front is Front.RIGHT:
            most = scanner.left_share * capacity_tokens + self._max_num_batched_tokens
            if held[Front.LEFT] < most:
                yield Front.LEFT

    def _at(self, front: Front, room_tokens: float) -> Candidate:
        return Candidate(self._upcoming.peek(front), front, room_tokens)
