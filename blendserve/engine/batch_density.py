"""How dense the requests are that run at this moment: their compute seconds over their memory seconds."""

from __future__ import annotations

import numpy as np

from blendserve.dual_scanner import Front
from blendserve.engine.shard_reader import ShardReader


class BatchDensity:
    """Follows a shard's admitted and finished requests by the costs that the plan states."""

    def __init__(self, reader: ShardReader) -> None:
        self._scanner = reader.scanner
        costs = np.stack([reader.compute_seconds, reader.memory_seconds])  # [2, num_requests]
        self._costs = dict(zip(reader.remaining_row_indices.tolist(), costs.T, strict=True))
        self._before = np.concatenate([np.zeros((2, 1)), np.cumsum(costs, axis=1)], axis=1)  # [2, num_requests + 1]
        self._finished = np.zeros(2)

    def finish(self, row_index: int) -> None:
        self._finished += self._costs[row_index]

    def value(self) -> float | None:
        """Of the requests that were admitted and aren't finished; None while there are none."""
        num_left = self._scanner.num_remaining
        first = self._scanner.peek(Front.LEFT) if num_left else 0
        waiting = self._before[:, first + num_left] - self._before[:, first] if num_left else np.zeros(2)
        compute, memory = self._before[:, -1] - waiting - self._finished
        return round(float(compute / memory), 3) if memory > 1e-12 and compute > 0 else None
