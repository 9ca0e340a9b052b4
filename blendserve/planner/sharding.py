"""Parts of equal work: cut an order into shards so that each holds the same compute and the same memory time."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

SHARD_SECONDS = 1200.0  # long enough to be worth loading a model, short enough to run again after a crash


def choose_num_shards(stated: int | None, *, predicted_seconds: float, num_requests: int) -> int:
    """The stated number, or one shard per SHARD_SECONDS of predicted time; never more than there are requests."""
    wanted = stated if stated is not None else math.ceil(predicted_seconds / SHARD_SECONDS)
    return min(max(wanted, 1), num_requests)


def split_from_both_ends(
    compute_seconds: NDArray[np.float64], memory_seconds: NDArray[np.float64], num_shards: int
) -> list[NDArray[np.int64]]:
    """Places of each shard when the order [num_requests], by falling density, is cut from both ends.

    A shard takes a run from the left and one from the right with its share of the compute time and its share of the
    memory time (two equations, two unknowns). For each left run one right run gives the compute time; the longer the
    left run, the less memory time the two hold, so the left run is found by bisection. The last shard is the middle.
    """
    places = np.arange(len(compute_seconds))
    compute_before = np.concatenate([np.zeros(1), np.cumsum(compute_seconds)])
    memory_before = np.concatenate([np.zeros(1), np.cumsum(memory_seconds)])
    left, right = 0, len(places)
    shards = []
    for num_left in range(num_shards, 1, -1):
        remaining = slice(left, right + 1)
        most = right - left - (num_left - 1)  # each later shard needs a request
        taken_left, taken_right = _runs_of_one_shard(
            compute_before[remaining] - compute_before[left],
            memory_before[remaining] - memory_before[left],
            num_left,
            most,
        )
        shards.append(np.concatenate([places[left : left + taken_left], places[right - taken_right : right]]))
        left, right = left + taken_left, right - taken_right
    shards.append(places[left:right])
    return shards


def _runs_of_one_shard(
    compute: NDArray[np.float64], memory: NDArray[np.float64], num_shards: int, most: int
) -> tuple[int, int]:
    """How many requests from the left and from the right make one of `num_shards` equal parts, 1 to `most` together.

    `compute`, `memory` [num_remaining + 1]: seconds before each place. Requests are lumps: where the compute time fits
    to the last request, the memory time may be off by many, so the right runs next to the solution are all weighed.
    """
    wanted_compute, wanted_memory = compute[-1] / num_shards, memory[-1] / num_shards

    def right_run(taken_left: int) -> int:
        begin = int(np.searchsorted(compute, compute[-1] - max(wanted_compute - compute[taken_left], 0.0)))
        return min(len(compute) - 1 - begin, most - taken_left)

    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        held_memory = memory[middle] + memory[-1] - memory[-1 - right_run(middle)]
        if held_memory > wanted_memory and compute[middle] < wanted_compute:
            low = middle + 1
        else:
            high = middle
    best, least = (1, 0), np.inf
    for taken_left in {low, max(low - 1, 0)}:
        runs = np.arange(taken_left == 0, min(right_run(max(low - 1, 0)) + 1, most - taken_left) + 1)
        compute_error = np.abs(compute[taken_left] + compute[-1] - compute[-1 - runs] - wanted_compute)
        memory_error = np.abs(memory[taken_left] + memory[-1] - memory[-1 - runs] - wanted_memory)
        error = np.maximum(compute_error / compute[-1], memory_error / memory[-1])
        if len(runs) and error.min() < least:
            best, least = (taken_left, int(runs[error.argmin()])), float(error.min())
    return best


def split_in_order(
    compute_seconds: NDArray[np.float64], memory_seconds: NDArray[np.float64], num_shards: int
) -> list[NDArray[np.int64]]:
    """Places of each shard when the order [num_requests] is cut into consecutive runs of equal total time."""
    num_requests = len(compute_seconds)
    before = np.concatenate([np.zeros(1), np.cumsum(compute_seconds + memory_seconds)])
    wanted = before[-1] * np.arange(1, num_shards) / num_shards
    cuts = np.searchsorted(before, wanted)
    steps = np.arange(1, num_shards)
    cuts = np.maximum.accumulate(np.maximum(cuts, steps) - steps) + steps  # at least one request in each shard
    cuts = np.minimum(cuts, num_requests - num_shards + steps)
    return np.split(np.arange(num_requests), cuts)
