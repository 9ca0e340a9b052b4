"""Prompts in line to be computed, first come, first served, in chunks as large as a step has room for."""

from __future__ import annotations

from collections import deque

from blendserve.planner.performance_model import CostConstants


class PrefillQueue:
    """Admitted requests whose prompts aren't computed; `num_tokens` are still to do."""

    __slots__ = ("_chunks", "_constants", "num_tokens")

    def __init__(self, constants: CostConstants) -> None:
        self._constants = constants
        self._chunks: deque[list[int]] = deque()  # [request, tokens computed, tokens to compute up to]
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._chunks)

    @property
    def requests(self) -> list[int]:
        """In line, the first one first."""
        return [chunk[0] for chunk in self._chunks]

    def append(self, request: int, num_cached: int, num_tokens: int) -> None:
        """`num_tokens` to compute for `request`, `num_cached` of them found in the cache; the last one never is."""
        self.num_tokens += max(num_tokens - num_cached, 1)
        self._chunks.append([request, min(num_cached, num_tokens - 1), num_tokens])

    def take(self, most_tokens: int, most_seconds: float) -> tuple[float, list[int]]:
        """Compute a step's chunks, at least one token: how long that takes, and which requests are through."""
        pair_seconds = self._constants.seconds_per_attended_pair
        tokens, seconds, finished = 0, 0.0, []
        while self._chunks and tokens < most_tokens and (seconds < most_seconds or not tokens):
            request, done, last = chunk = self._chunks[0]
            token_seconds = self._constants.seconds_per_layer_token + done * pair_seconds
            count = int(max(min(most_tokens - tokens, last - done, (most_seconds - seconds) / token_seconds), 1))
            chunk[1] += count
            tokens += count
            seconds += count * (token_seconds + count / 2 * pair_seconds)
            if chunk[1] == last:
                self._chunks.popleft()
                finished.append(request)
                seconds += self._constants.seconds_per_sampled_token
        self.num_tokens = self.num_tokens - tokens if self._chunks else 0
        return seconds, finished
