"""A simulator that can be asked in mid-run how far it is, and told what has become known of output lengths since."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from blendserve.dual_scanner import Front
from blendserve.planner.simulator import Simulator


class ObservedSimulator(Simulator):
    """What a planner sees and says between two calls of `run`."""

    @property
    def admitted(self) -> NDArray[np.int64]:
        """The requests that have started and not finished, in no order."""
        return np.array(self._unfinished(), dtype=np.int64)

    @property
    def finished(self) -> NDArray[np.int64]:
        """The requests that are done, in the order in which they finished."""
        return np.array(self._finished, dtype=np.int64)

    @property
    def remaining(self) -> NDArray[np.int64]:
        """The requests that are assigned and not admitted."""
        num_remaining = self._scanner.num_remaining
        begin = self._scanner.peek(Front.LEFT) if num_remaining else 0
        return np.array(self._order[begin : begin + num_remaining], dtype=np.int64)

    def num_produced(self, requests: NDArray[np.int64]) -> NDArray[np.int64]:
        """[num_requests]: the output tokens so far of each of `requests`."""
        return np.array([self._count_produced(request) for request in requests.tolist()], dtype=np.int64)

    def revise(self, requests: NDArray[np.int64], estimates: NDArray[np.int64]) -> None:
        """Expect other output lengths of those of `requests` that decode or wait preempted; comes before `assign`."""
        waiting = set(self._preempted)
        for request, estimate in zip(requests.tolist(), estimates.tolist(), strict=True):
            produced = self._count_produced(request)
            if estimate <= produced:
                continue
            if request in waiting:
                self._estimate[request] = estimate
            elif request in self._running:
                self._lengthen(request, estimate - self._estimate[request])
                self._await_end(request, estimate - produced)
