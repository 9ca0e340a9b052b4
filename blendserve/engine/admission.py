"""Whether one more request fits beside the running ones, by how long each is still expected to grow."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from blendserve.dual_scanner import Front
from blendserve.engine.request import Request


class MemoryForecast:
    """The highest KV cache use that the running requests are expected to reach, in tokens.

    All decode in step, one token each, and free their memory when they finish. So use peaks just before a request
    finishes: when it has r tokens to go, every request that isn't done by then has grown by r. That allows about twice
    as many requests as counting every one at its full length.

    `footprint_tokens`: by front, what its requests hold on average over their lives.
    """

    def __init__(self, running: Iterable[Request], *, num_used_tokens: int, capacity_tokens: int) -> None:
        """num_used_tokens: what running requests hold now, shared prefixes once."""
        self._capacity_tokens = capacity_tokens
        self._base_tokens = num_used_tokens
        self._own_tokens: list[int] = []  # by request: what it will hold once prefilled and gives back when it finishes
        self._remaining_tokens: list[int] = []
        self.footprint_tokens = {Front.LEFT: 0.0, Front.RIGHT: 0.0}
        for request in running:
            self.footprint_tokens[request.current_front] += request.footprint_tokens
            self._base_tokens += request.num_prefill_tokens - min(
                request.num_computed_tokens, request.num_prefill_tokens
            )
            self._own_tokens.append(request.num_tokens - request.num_shared_tokens)
            self._remaining_tokens.append(request.remaining_output_tokens)

    def fits(self, request: Request, num_cached_tokens: int, num_revived_tokens: int) -> bool:
        """Whether `request` fits too. num_cached_tokens: of its prompt, in the cache; num_revived_tokens: of those, the
        ones that no running request holds, so that they can't be evicted any more."""
        new_tokens = request.num_tokens - num_cached_tokens
        own = np.array([*self._own_tokens, new_tokens], dtype=np.int64)
        remaining = np.array([*self._remaining_tokens, request.remaining_output_tokens], dtype=np.int64)
        order = np.argsort(remaining)
        freed_before = np.concatenate(([0], np.cumsum(own[order])[:-1]))
        num_unfinished = np.arange(len(order), 0, -1)
        base = self._base_tokens + new_tokens + num_revived_tokens
        peak = int((base - freed_before + num_unfinished * remaining[order]).max())
        return peak <= self._capacity_tokens

    def add(self, request: Request, num_cached_tokens: int, num_revived_tokens: int) -> None:
        """Count `request` as running."""
        self.footprint_tokens[request.current_front] += request.footprint_tokens
        new_tokens = request.num_tokens - num_cached_tokens
        self._base_tokens += new_tokens + num_revived_tokens
        self._own_tokens.append(new_tokens)
        self._remaining_tokens.append(request.remaining_output_tokens)
