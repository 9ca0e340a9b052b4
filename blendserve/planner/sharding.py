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
        compute = (compute_before[right] - compute_before[left]) / num_left
        memory = (memory_before[right] - memory_before[left]) / num_left
        most = right - left - (num_left - 1)  # each later shard needs a request
        taken_left, taken_right = _runs_with(compute_before, memory_before, left, right, compute, memory, most)
        shards.append(np.concatenate([places[left : left + taken_left], places[right - taken_right : right]]))
        left, right = left + taken_left, right - taken_right
    shards.append(places[left:right])
    return shards


def _runs_with(
    compute_before: NDArray[np.float64],
    memory_before: NDArray[np.float64],
    left: int,
    right: int,
    compute: float,
    memory: float,
    most: int,
) -> tuple[int, int]:
    """How many requests from the left and from the right hold `compute` and `memory` seconds together, 1 to `most`."""

    def right_run(taken_left: int) -> int:
        missing = compute - (compute_before[left + taken_left] - compute_before[left])
        begin = _nearest(compute_before, compute_before[right] - max(missing, 0.0))
        return min(max(right - begin, 0), most - taken_left)

    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        held = memory_before[left + middle] - memory_before[left]
        held += memory_before[right] - memory_before[right - right_run(middle)]
        overfull = compute_before[left + middle] - compute_before[left] >= compute
        if held > memory and not overfull:
            low = middle + 1
        else:
            high = middle
    taken_right = right_run(low)
    return (low, taken_right) if low + taken_right > 0 else (1, 0)


def _nearest(rising: NDArray[np.float64], value: float) -> int:
    above = int(np.searchsorted(rising, value))
    if above == len(rising):
        return above - 1
    return above - 1 if above > 0 and value - rising[above - 1] <= rising[above] - value else above


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
