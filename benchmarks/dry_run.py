"""The engine's scheduler without a model: steps are planned but not computed, and each token that they sample is 1."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from blendserve.engine.request import Request
from blendserve.engine.scheduled_batch import ScheduledBatch
from blendserve.engine.scheduler import Scheduler


class DryStep(NamedTuple):
    """A planned step, the requests that ended with its tokens, and the CPU time of planning it."""

    batch: ScheduledBatch
    ended: list[Request]
    schedule_seconds: float


class DryRun:
    """Does for a scheduler what the engine does around it."""

    def __init__(
        self, scheduler: Scheduler, num_output_tokens: Callable[[Request], int] = lambda request: request.max_tokens
    ) -> None:
        """num_output_tokens: how many each request generates, if its limit allows."""
        self._scheduler = scheduler
        self._num_output_tokens = num_output_tokens
        self._serials = np.zeros_like(scheduler.running.serials)  # by row: of the request that `_lengths` is for
        self._lengths = np.zeros_like(self._serials)

    def steps(self) -> Iterator[DryStep]:
        """Plan one step after the other, each with the tokens of the one before, until no request is left."""
        while self._scheduler.has_unfinished:
            started = time.thread_time()  # of this thread: other work doesn't count
            batch = self._scheduler.schedule()
            seconds = time.thread_time() - started
            yield DryStep(batch, self.take_tokens(batch), seconds)

    def take_tokens(self, batch: ScheduledBatch) -> list[Request]:
        """Let a planned step's tokens be known. Returns the requests that end with them."""
        running = self._scheduler.running
        rows = batch.sampled_rows[running.serials[batch.sampled_rows] == batch.sampled_serials]
        running.record(rows, np.ones(len(rows), dtype=np.int32))
        for row in rows[self._serials[rows] != running.serials[rows]].tolist():
            self._serials[row] = running.serials[row]
            self._lengths[row] = min(self._num_output_tokens(running.request(row)), running.max_tokens[row])
        return [self._scheduler.finish(row) for row in rows[running.known_tokens[rows] >= self._lengths[rows]].tolist()]
