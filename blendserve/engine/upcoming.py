"""The requests that wait at the fronts of a source, read ahead as far as that is of use."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from blendserve.dual_scanner import DualScanner, Front
from blendserve.engine.request import Request
from blendserve.engine.running import RunningRequests
from blendserve.known_lengths import KnownLengths
from blendserve.length_learning import LEARNT_REST_SHARE, LengthLearner, surplus

_AHEAD = 16  # at each front
# How many steps a view of what lies ahead may age: where the fronts have moved since, and where they haven't.
_AGE_STEPS = 4
_MAX_AGE_STEPS = 32
_FEW = 256  # waiting requests that are all looked at


class RequestSource(Protocol):
    """Where requests come from: the order of admission, and the requests by their position in it."""

    @property
    def scanner(self) -> DualScanner: ...

    @property
    def learner(self) -> LengthLearner | None:
        """What learns output lengths while requests run; None where they are known."""
        ...

    @property
    def lengths(self) -> KnownLengths | None:
        """Of all requests, where they are known."""
        ...

    def request(self, position: int) -> Request: ...


class UpcomingRequests:
    """A source, with the requests that were read before they are taken."""

    def __init__(self, source: RequestSource) -> None:
        self._source = source
        self.scanner = source.scanner
        self.learner = source.learner
        self._read: dict[int, Request] = {}  # by position
        self._seen_at: tuple[int, int] = (-1, -_AGE_STEPS)  # num_remaining then, step then
        self._waiting_tokens: int | None = None  # once few are left

    @property
    def waiting_tokens(self) -> float:
        """What all that waits will hold at its full length; infinite as long as it is more than a few requests."""
        if self.scanner.num_remaining > _FEW:
            return math.inf
        if self._waiting_tokens is None:
            self._waiting_tokens = sum(self._at(position).full_tokens for position in self.scanner.remaining.tolist())
        return self._waiting_tokens

    def peek(self, front: Front) -> Request:
        """The next request at `front`, not taken."""
        return self._at(self.scanner.peek(front))

    def take(self, front: Front) -> None:
        """Take the request at `front` out of those that wait."""
        request = self._read.pop(self.scanner.take(front), None)
        if request is None or self._waiting_tokens is None:
            self._waiting_tokens = None
        else:
            self._waiting_tokens -= request.full_tokens

    def learn(self, step: int, running: RunningRequests, capacity_tokens: int) -> list[int]:
        """Now and then, estimate anew all that waits and all that runs, and put what waits in the order that follows.

        Returns the rows of requests that had better begin again later: together they will outgrow the KV cache.
        """
        learner = self._source.learner
        if learner is None or not learner.is_due(step):
            return []
        rows = running.active_rows()
        positions = np.array([running.request(row).position for row in rows.tolist()], dtype=np.int64)
        running.expect(rows, learner.revise(positions, running.generated_tokens[rows]))
        self._read.clear()  # with other estimates
        self._waiting_tokens = None
        long = rows[running.is_right(rows) & running.is_decoding[rows]]
        held = running.num_tokens(long) - running.shared_tokens[long]
        rest = (running.remaining_output_tokens(long) * LEARNT_REST_SHARE).astype(np.int64)
        shed: list[int] = long[surplus(held, rest, capacity_tokens)].tolist()
        return shed

    def has_moved(self, step: int) -> bool:
        """Whether it is worth looking `ahead` again in this step; if so, the next few steps it isn't."""
        seen_remaining, seen_step = self._seen_at
        num_remaining = self.scanner.num_remaining
        if step - seen_step < (_MAX_AGE_STEPS if seen_remaining == num_remaining else _AGE_STEPS):
            return False
        self._seen_at = (num_remaining, step)
        return True

    def ahead(self) -> Iterator[Request]:
        """The requests that will be admitted next from either front."""
        if self.scanner.num_remaining == 0:
            return
        left = self.scanner.ahead(Front.LEFT, _AHEAD)
        yield from map(self._at, left)
        if self.scanner.is_two_ended:
            num_others = min(_AHEAD, self.scanner.num_remaining - len(left))
            yield from map(self._at, self.scanner.ahead(Front.RIGHT, num_others))

    def _at(self, position: int) -> Request:
        if position not in self._read:
            self._read[position] = self._source.request(position)
        return self._read[position]
