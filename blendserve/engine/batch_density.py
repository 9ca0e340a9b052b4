"""How dense the requests are that run at this moment: their compute seconds over their memory seconds."""

from __future__ import annotations

import numpy as np

from blendserve.engine.shard_reader import ShardReader


class BatchDensity:
    """Follows a shard's admitted and finished requests by the costs that the plan states."""

    def __init__(self, reader: ShardReader) -> None:
        self._reader = reader
        self._costs = np.stack([reader.compute_seconds, reader.memory_seconds])  # [2, num_requests]
        self._is_finished = np.zeros(reader.num_requests, dtype=np.bool_)

    def finish(self, row_index: int) -> None:
        self._is_finished[self._reader.position_of(row_index)] = True

    def value(self) -> float | None:
        """Of the requests that were admitted and aren't finished; None while there are none."""
        is_running = ~self._is_finished
        is_running[self._reader.scanner.remaining] = False
        compute, memory = self._costs[:, is_running].sum(axis=1)
        return round(float(compute / memory), 3) if memory > 1e-12 and compute > 0 else None
