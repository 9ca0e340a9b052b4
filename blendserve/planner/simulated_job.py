"""A workload to simulate: what the planner knows of it, and the output lengths that only the simulator does."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from blendserve.planner.output_lengths import OutputLengths
from blendserve.planner.prefix_tree import build_prefix_tree
from blendserve.planner.schedule import PlannedRequests
from blendserve.planner.simulation import SimulatedRequests


@dataclass(frozen=True, slots=True)
class SimulatedJob:
    """A workload in the order of its prompts: what the planner knows and, [num_requests], the lengths to come."""

    requests: PlannedRequests
    output_tokens: NDArray[np.int64]

    @classmethod
    def of_estimates(cls, requests: PlannedRequests) -> SimulatedJob:
        """Every request as long as it is estimated to be."""
        return cls(requests, np.maximum(np.rint(requests.mean_output_tokens), 1).astype(np.int64))

    @property
    def num_requests(self) -> int:
        return self.requests.num_requests

    @property
    def prefix_sharing(self) -> float:
        """The most that any order can share, of the prompt tokens."""
        prompt_tokens = int(self.requests.num_prompt_tokens.sum())
        return int(self.requests.shared_prefix_tokens.sum()) / max(prompt_tokens, 1)

    @property
    def lengths(self) -> OutputLengths:
        """The output lengths that the planner knows."""
        requests = self.requests
        return OutputLengths(
            requests.mean_output_tokens, requests.mean_square_output_tokens, np.zeros(self.num_requests, np.int64)
        )

    def simulated_requests(self) -> SimulatedRequests:
        """What the simulator has to run."""
        tree = build_prefix_tree(self.requests.shared_prefix_tokens)
        return SimulatedRequests(tree, self.requests.num_prompt_tokens, self.output_tokens)

    def subset(self, rows: NDArray[np.int64], lengths: OutputLengths) -> PlannedRequests:
        """Only `rows` (ascending) of the job, with `lengths` of the whole job as what the planner knows."""
        return replace(
            self.requests.subset(rows),
            mean_output_tokens=lengths.mean[rows],
            mean_square_output_tokens=lengths.mean_square[rows],
        )
