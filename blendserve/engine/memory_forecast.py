"""Whether one more request fits beside the running ones, by how long each is still expected to grow."""

from __future__ import annotations

import numpy as np

from blendserve.dual_scanner import Front
from blendserve.engine.request import Request
from blendserve.engine.running import IntArray, RunningRequests


class MemoryForecast:
    """The highest KV cache use that the running requests are expected to reach, in tokens.

    All decode in step, one token each, and free their memory when they finish. So use peaks just before a request
    finishes: when it has r tokens to go, every request that isn't done by then has grown by r. That allows about twice
    as many requests as counting every one at its full length. Each leaves half of its last block empty on average.

    `unprefilled_tokens`: of admitted requests, that are still to be computed. `footprint_tokens`: by front, what its
    requests hold on average over their lives.
    """

    def __init__(
        self,
        running: RunningRequests,
        *,
        num_used_tokens: int,
        capacity_tokens: int,
        block_size: int,
        rest_share: float = 1.0,
    ) -> None:
        """num_used_tokens: what running requests hold now, shared prefixes and filled parts of blocks only.

        rest_share: of the tokens that requests are expected to go on for, what counts.
        """
        self._capacity_tokens = capacity_tokens
        self._unfilled_tokens = block_size // 2
        rows = running.active_rows()
        unprefilled = np.maximum(running.prefill_tokens[rows] - running.context_tokens[rows], 0)
        self.unprefilled_tokens = int(unprefilled.sum())
        self._base_tokens = num_used_tokens + self.unprefilled_tokens
        self._rest_share = rest_share
        remaining = np.maximum((running.remaining_output_tokens(rows) * rest_share).astype(np.int64), 1)
        order = np.argsort(remaining)
        # By rising remaining tokens: what each will hold once prefilled and gives back when it finishes.
        self._remaining_tokens = remaining[order]
        self._own_tokens = (running.num_tokens(rows) - running.shared_tokens[rows])[order]
        self._peaks: tuple[IntArray, IntArray] | None = None  # of these requests, once it is asked for
        footprint, is_right = running.footprint_tokens(rows), running.is_right(rows)
        self.footprint_tokens = {
            Front.LEFT: float(footprint[~is_right].sum()),
            Front.RIGHT: float(footprint[is_right].sum()),
        }

    @property
    def held_tokens(self) -> int:
        """What the running requests hold now, with what is still to be computed of their prompts."""
        return self._base_tokens

    @property
    def is_empty(self) -> bool:
        """Whether nothing runs."""
        return len(self._own_tokens) == 0

    def fits(
        self, request: Request, num_cached_tokens: int, num_revived_tokens: int, room_tokens: float | None = None
    ) -> bool:
        """Whether `request` fits too, within `room_tokens`, by default the whole cache.

        num_cached_tokens: of its prompt, in the cache; num_revived_tokens: of those, the ones that no running request
        holds, so that they can't be evicted any more.

        What comes after its end isn't its business: otherwise short requests would wait for room that long ones will
        need much later.
        """
        base = self._base_tokens + request.num_tokens - num_cached_tokens + num_revived_tokens
        rest = self._rest(request)
        if self._peaks is None:
            self._peaks = _peaks(self._own_tokens, self._remaining_tokens, self._unfilled_tokens)
        freed_before, highest_before = self._peaks
        place = int(np.searchsorted(self._remaining_tokens, rest))
        num_unfinished = len(self._own_tokens) - place + 1
        at_its_end = num_unfinished * (rest + self._unfilled_tokens) - int(freed_before[place])
        room = self._capacity_tokens if room_tokens is None else room_tokens
        return base + max(at_its_end, int(highest_before[place])) <= room

    def add(self, request: Request, num_cached_tokens: int, num_revived_tokens: int) -> None:
        """Count `request` as running."""
        new_tokens, rest = request.num_tokens - num_cached_tokens, self._rest(request)
        self.unprefilled_tokens += request.num_prefill_tokens - request.num_computed_tokens
        self.footprint_tokens[request.front] += new_tokens + request.remaining_output_tokens / 2
        self._base_tokens += new_tokens + num_revived_tokens
        place = int(np.searchsorted(self._remaining_tokens, rest))
        self._own_tokens = _inserted(self._own_tokens, place, new_tokens)
        self._remaining_tokens = _inserted(self._remaining_tokens, place, rest)
        self._peaks = None

    def _rest(self, request: Request) -> int:
        return max(int(request.remaining_output_tokens * self._rest_share), 1)


def _peaks(own: IntArray, remaining: IntArray, unfilled_tokens: int) -> tuple[IntArray, IntArray]:
    """Of m requests by rising remaining tokens, [m + 1] each: what the first k give back when they end, and the most
    that is held beyond the base at one of these ends, with another request that goes on longer."""
    freed_before = np.concatenate(([0], np.cumsum(own)))
    num_unfinished = np.arange(len(own) + 1, 1, -1)
    held = num_unfinished * (remaining + unfilled_tokens) - freed_before[:-1]
    highest_before = np.concatenate(([np.iinfo(np.int64).min // 2], np.maximum.accumulate(held)))
    return freed_before, highest_before


def _inserted(values: IntArray, place: int, value: int) -> IntArray:
    """np.insert, which takes several times as long."""
    longer = np.empty(len(values) + 1, dtype=values.dtype)
    longer[:place], longer[place], longer[place + 1 :] = values[:place], value, values[place:]
    return longer
