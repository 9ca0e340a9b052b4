"""Parts of equal work: cut an order into shards so that each holds the same compute and the same memory time."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_LUMPS_OF_A_SHARD = 512  # requests that are more than this part of a shard are dealt out one by one
_PIECES_OF_A_SHARD = 4
_REQUESTS_OF_A_PIECE = 64  # at least
_LEAST_SECONDS = 1e-300
SHARD_SECONDS = 1800.0  # at most, and half of it at least where there are several: few tails, and little to run again


def choose_num_shards(stated: int | None, *, predicted_seconds: float, num_requests: int, gpus: int = 1) -> int:
    """The stated number, or one shard per SHARD_SECONDS of predicted time, the same number for each of `gpus`; never
    more than there are requests."""
    wanted = stated if stated is not None else gpus * math.ceil(max(predicted_seconds, 1e-9) / (gpus * SHARD_SECONDS))
    return min(max(wanted, 1), num_requests)


def split_from_both_ends(
    compute_seconds: NDArray[np.float64],
    memory_seconds: NDArray[np.float64],
    num_shards: int,
    *,
    is_free: NDArray[np.bool_] | None = None,
    is_alone: NDArray[np.bool_] | None = None,
) -> list[NDArray[np.int64]]:
    """Places of each shard, ascending, when the order [num_requests], by falling density, is cut from both ends.

    Requests that are a good part of a shard by themselves, and to which what they share is worth little (`is_free`),
    are dealt out first, the largest to the emptiest shard; those whose prompts share next to nothing (`is_alone`) are
    dealt out in turn, as they stand: so every shard gets its part of each kind, whatever the estimate of that kind is
    worth. None of either by default. The rest is cut into pieces, each a run from the left and one from the
    right that hold what is wanted of the compute time and of the memory time (two equations, two unknowns), and every
    shard gets pieces from the ends as well as from the middle.
    """
    costs = np.stack([compute_seconds, memory_seconds])
    shares = costs / np.maximum(costs.sum(axis=1), _LEAST_SECONDS)[:, None]
    loads = np.zeros((2, num_shards))
    nobody = np.zeros(len(compute_seconds), np.bool_)
    is_free, is_alone = (nobody if chosen is None else chosen for chosen in (is_free, is_alone))
    is_lump = is_free & (shares.max(axis=0, initial=0.0) > 1 / (_LUMPS_OF_A_SHARD * num_shards))
    for others in (~is_lump & ~is_alone, ~is_lump & is_alone):
        if np.count_nonzero(others) < num_shards:  # too few to give each shard one
            is_lump |= others
    parts = _deal(np.flatnonzero(is_lump), shares, loads)
    in_turn = np.flatnonzero(is_alone & ~is_lump)
    turns = np.concatenate([np.arange(num_shards), np.arange(num_shards)[::-1]])
    turn = turns[np.arange(len(in_turn)) % len(turns)]
    together = np.flatnonzero(~is_alone & ~is_lump)
    for row in range(2):
        loads[row] += np.bincount(turn, weights=shares[row, in_turn], minlength=num_shards)
    pieces = _cut_from_both_ends(shares[:, together], loads) if len(together) else [[] for _ in range(num_shards)]
    return [
        np.sort(np.concatenate([part, in_turn[turn == shard], *(together[piece] for piece in pieces[shard])]))
        for shard, part in enumerate(parts)
    ]


def _deal(
    places: NDArray[np.int64], shares: NDArray[np.float64], loads: NDArray[np.float64]
) -> list[NDArray[np.int64]]:
    """Give each of `places`, the largest first, to the shard that it fills least; adds to `loads` [2, num_shards]."""
    hands: list[list[int]] = [[] for _ in range(loads.shape[1])]
    for place in places[np.argsort(-shares[:, places].max(axis=0, initial=0.0), kind="stable")].tolist():
        filled = loads + shares[:, place : place + 1]
        shard = int(np.lexsort((filled.sum(axis=0), filled.max(axis=0)))[0])
        loads[:, shard] += shares[:, place]
        hands[shard].append(place)
    return [np.array(hand, dtype=np.int64) for hand in hands]


def _cut_from_both_ends(shares: NDArray[np.float64], loads: NDArray[np.float64]) -> list[list[NDArray[np.int64]]]:
    """Pieces for each shard of [2, num_requests] shares of the job, from the ends to the middle; adds to `loads`."""
    num_requests, num_shards = shares.shape[1], loads.shape[1]
    num_rounds = min(_PIECES_OF_A_SHARD, max(num_requests // (_REQUESTS_OF_A_PIECE * num_shards), 1))
    before = np.concatenate([np.zeros((2, 1)), np.cumsum(shares, axis=1)], axis=1)
    pieces: list[list[NDArray[np.int64]]] = [[] for _ in range(num_shards)]
    left, right = 0, num_requests
    turns = [
        shard if turn % 2 == 0 else num_shards - 1 - shard for turn in range(num_rounds) for shard in range(num_shards)
    ]
    for number, shard in enumerate(turns[:-1]):
        wanted = (1 / num_shards - loads[:, shard]) / (num_rounds - number // num_shards)
        compute, memory = before[:, left : right + 1] - before[:, left : left + 1]
        most = right - left - (len(turns) - 1 - number)  # each later piece needs a request
        taken_left, taken_right = _runs_of_one_shard(compute, memory, wanted, most)
        piece = np.concatenate([np.arange(left, left + taken_left), np.arange(right - taken_right, right)])
        loads[:, shard] += shares[:, piece].sum(axis=1)
        pieces[shard].append(piece)
        left, right = left + taken_left, right - taken_right
    pieces[turns[-1]].append(np.arange(left, right))
    return pieces


def _runs_of_one_shard(
    compute: NDArray[np.float64], memory: NDArray[np.float64], wanted: NDArray[np.float64], most: int
) -> tuple[int, int]:
    """How many requests from the left and from the right hold `wanted` compute and memory time, 1 to `most` together.

    `compute`, `memory` [num_remaining + 1]: time before each place. For each left run one right run gives the compute
    time; the longer the left run, the less memory time the two hold, so the left run is found by bisection. Requests
    are lumps: where the compute time fits to the last request, the memory time may be off by many, so the right runs
    next to the solution are all weighed.
    """
    wanted_compute, wanted_memory = max(float(wanted[0]), 0.0), max(float(wanted[1]), 0.0)

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
        error = np.maximum(compute_error, memory_error)
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
