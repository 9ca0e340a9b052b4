"""Workloads as the planner sees them, made from lengths alone: what sorting and analyzing their tokens would give."""

from __future__ import annotations

import numpy as np

from blendserve.planner.schedule import PlannedRequests
from blendserve.planner.simulated_job import SimulatedJob
from blendserve.planner.workload import RequestLengths

PLACEMENTS = ("clustered", "natural", "shuffled")


def job_of(parts: list[RequestLengths], *, placement: str = "clustered") -> SimulatedJob:
    """What sorting the parts by their prompts gives.

    clustered: each part's prompts begin with a token of its own, as tasks do that have a template each, and stand
    together. natural: those of a part with prefix groups do (MMLU's all begin with "The following are multiple choice
    questions"), the free texts of the others are shuffled among each other. shuffled: the prefix groups and the single
    prompts of all parts are.
    """
    random = np.random.default_rng(0)
    prompt = np.concatenate([part.prompt_tokens for part in parts])
    output = np.concatenate([part.output_tokens for part in parts])
    shared = np.concatenate([part.shared_tokens for part in parts])
    order = np.arange(len(prompt))
    if placement == "clustered":
        is_first = np.concatenate([np.arange(len(part.group)) == 0 for part in parts])
        shared = np.minimum(np.maximum(shared, ~is_first), prompt)
    else:
        run = np.cumsum(shared == 0)
        if placement == "natural":
            begins_alike = np.concatenate([np.full(len(part.group), bool((part.group >= 0).any())) for part in parts])
            run[begins_alike] = run[begins_alike].min(initial=run[-1])
        order = np.lexsort((order, random.permutation(run[-1] + 1)[run]))
    mean = output[order].astype(np.float64)
    arrival = random.permutation(len(prompt))
    return SimulatedJob(PlannedRequests(prompt[order], shared[order], mean, mean**2, arrival), output[order])
