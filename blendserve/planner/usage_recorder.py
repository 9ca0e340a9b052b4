"""Keeps what a simulated machine did over time in a bounded number of pieces, however many steps there are."""

from __future__ import annotations

import numpy as np

from blendserve.planner.simulation import Usage

_MAX_PIECES = 512
_FIRST_PIECE_SECONDS = 2.0**-20


class UsageRecorder:
    """Pieces of equal length that double when there are too many of them."""

    __slots__ = ("_piece", "_seconds", "_sums")

    def __init__(self) -> None:
        self._piece = _FIRST_PIECE_SECONDS
        self._seconds = 0.0
        self._sums: list[list[float]] = [[], [], []]  # compute and memory seconds, token seconds, one a piece

    def add(self, seconds: float, compute: float, memory: float, held_tokens: float) -> None:
        """`seconds` have passed with this much work, evenly, while the cache held `held_tokens`."""
        begin, end = self._seconds, self._seconds + seconds
        self._seconds = end
        while end > self._piece * _MAX_PIECES:
            self._merge()
        first, last = int(begin / self._piece), int(end / self._piece)
        sums = self._sums
        for values in sums:
            values.extend([0.0] * (last + 1 - len(values)))
        amounts = (compute, memory, held_tokens * seconds)
        if first == last or seconds <= 0:
            for values, amount in zip(sums, amounts, strict=True):
                values[last] += amount
            return
        for piece in range(first, last + 1):
            part = (min(end, (piece + 1) * self._piece) - max(begin, piece * self._piece)) / seconds
            for values, amount in zip(sums, amounts, strict=True):
                values[piece] += amount * part

    def usage(self) -> Usage:
        """All that was added."""
        compute, memory, held = (np.array(values, dtype=np.float64) / self._piece for values in self._sums)
        return Usage(piece_seconds=self._piece, compute=compute, memory=memory, held_tokens=held)

    def _merge(self) -> None:
        self._piece *= 2
        self._sums = [[sum(values[index : index + 2]) for index in range(0, len(values), 2)] for values in self._sums]
