"""Output lengths of a shard's requests as they become known while it runs, and the order that follows from them.

The plan knows lengths by a sample at best. What has finished since, and how far the running requests are, tells more:
now and then all that waits is estimated anew and its units are sorted again. NumPy only, because both the planner's
simulator and the engine use it; it knows nothing of blocks, steps or prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from blendserve.dual_scanner import DualScanner

LEARNING_KEY: Final = b"blendserve.learning"  # metadata of a shard file
MIN_SAMPLES: Final = 4  # a class with fewer observed requests takes the figures of a coarser one
_MAX_EXTRAPOLATION = 16.0
_FIRST_STEPS = 64
_REVISED_SHARE = 0.125  # of the steps so far until the next revision
# Of the tokens that requests are expected to go on for, what counts when the peak of memory is foretold. Learnt lengths
# are means: requests that all seem to end at one time will end one after the other.
LEARNT_REST_SHARE: Final = 0.5
KNOWN: Final = -1  # class of a request whose length needs no learning


@dataclass(frozen=True, slots=True)
class ObservedLengths:
    """Requests that have run: classes int32 [num_observed, num_levels], finest first; num_tokens int64 and is_cut_off
    [num_observed]: at least that long where cut off, else just that long."""

    classes: NDArray[np.int32]
    num_tokens: NDArray[np.int64]
    is_cut_off: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class ShardLengths:
    """What a plan knows of a shard's requests; arrays [num_requests] in shard order.

    classes [num_requests, num_levels]: requests that are alike, from few to many; below 0: the length is known.
    estimated_tokens, max_tokens: output tokens. kv_prompt_tokens: prompt tokens that a decode step reads. unit_id:
    requests that stay together. compute_seconds, memory_seconds: by the estimate. `observed`: what ran before.
    """

    classes: NDArray[np.int32]
    estimated_tokens: NDArray[np.int64]
    max_tokens: NDArray[np.int64]
    kv_prompt_tokens: NDArray[np.int64]
    unit_id: NDArray[np.int64]
    compute_seconds: NDArray[np.float64]
    memory_seconds: NDArray[np.float64]
    seconds_per_prompt_token: float
    seconds_per_decode_token: float
    seconds_per_kv_token: float
    observed: ObservedLengths

    @property
    def is_learnable(self) -> bool:
        """Whether there is a request whose length isn't known."""
        return bool(self.classes.size) and bool((self.classes[:, 0] > KNOWN).any())


class LengthLearner:
    """Follows one shard; positions are those of its scanner. `finish` is O(1), `revise` a few passes over the shard."""

    def __init__(self, shard: ShardLengths, scanner: DualScanner) -> None:
        self._shard = shard
        self._scanner = scanner
        num_before, num_requests = len(shard.observed.num_tokens), len(shard.estimated_tokens)
        together = np.concatenate([shard.observed.classes, shard.classes])  # [num_before + num_requests, num_levels]
        self._levels = [np.unique(level, return_inverse=True)[1].reshape(-1) for level in together.T]
        self._is_learnt = shard.classes[:, 0] > KNOWN
        self._lengths = np.concatenate([shard.observed.num_tokens, np.zeros(num_requests)]).astype(np.float64)
        self._is_observed = np.arange(num_before + num_requests) < num_before
        self._is_cut_off = np.concatenate([shard.observed.is_cut_off, np.zeros(num_requests, np.bool_)])
        self._num_before = num_before
        self._next_step = _FIRST_STEPS
        self.estimated_tokens = shard.estimated_tokens.copy()  # of all, by position; those that run may be beyond it
        self.footprint_tokens = np.zeros(num_requests)  # KV cache tokens held on average over a life

    @property
    def token_seconds(self) -> tuple[float, float]:
        """What a prompt's token and reading a token of KV cache take, by the plan."""
        return self._shard.seconds_per_prompt_token, self._shard.seconds_per_kv_token

    def is_due(self, step: int) -> bool:
        """Whether to `revise` in this step of the engine; if so, the next ones it isn't.

        The longer the run, the more it takes to change a picture, so that revising stays a small part of each step.
        """
        if step < self._next_step:
            return False
        self._next_step = step + max(_FIRST_STEPS, int(_REVISED_SHARE * step))
        return True

    def finish(self, position: int, num_tokens: int, *, is_cut_off: bool) -> None:
        """The request at `position` is done after `num_tokens`; `is_cut_off`: its limit ended it."""
        self._set(np.array([position]), np.array([num_tokens]), is_cut_off)

    def revise(self, running: NDArray[np.int64], num_produced: NDArray[np.int64]) -> NDArray[np.int64]:
        """Estimate anew and let the scanner go on in the order that follows.

        running, num_produced [num_running]: positions of the requests that run, and their output tokens so far. Returns
        how many output tokens to expect of each of them in all.
        """
        self._set(running, num_produced, is_cut_off=True)
        mean, square, rest = self._estimate()
        self._reorder(mean, square)
        shard, learnt = self._shard, self._is_learnt[running]
        expected = np.minimum(num_produced + np.maximum(rest[running], 1), shard.max_tokens[running])
        return np.where(learnt, np.rint(expected), shard.estimated_tokens[running]).astype(np.int64)

    def _set(self, positions: NDArray[np.int64], num_tokens: NDArray[np.int64], is_cut_off: bool) -> None:
        places = positions + self._num_before
        self._lengths[places] = num_tokens
        self._is_observed[places] = True
        self._is_cut_off[places] = is_cut_off

    def _estimate(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Mean and mean square length, and what one that runs still has to go, of every request [num_requests]."""
        shard = self._shard
        limits = shard.max_tokens.astype(np.float64)
        planned = shard.estimated_tokens.astype(np.float64)
        mean, square, rest = planned.copy(), planned**2, planned.copy()
        is_censored = self._is_cut_off & (self._lengths < limits.max(initial=1.0))
        is_open, is_counted = self._is_learnt.copy(), self._is_observed.copy()
        for level in self._levels:
            found = class_moments(sums_by(level), is_counted, is_censored, self._lengths)
            has_enough = (found.count >= MIN_SAMPLES)[level]
            here = level[self._num_before :]
            taken = is_open & has_enough[self._num_before :]
            mean[taken], square[taken], rest[taken] = (
                values[here[taken]] for values in (found.mean, found.mean_square, found.rest)
            )
            is_open &= ~taken
            is_counted &= ~has_enough  # what is known of a finer class says nothing of the others of a coarser one
        mean, square = clip_moments(mean, square, np.maximum(limits, 1.0))
        return mean, square, rest

    def _reorder(self, mean: NDArray[np.float64], square: NDArray[np.float64]) -> None:
        shard = self._shard
        more = np.where(self._is_learnt, mean - shard.estimated_tokens, 0.0)
        compute = np.maximum(shard.compute_seconds + more * shard.seconds_per_decode_token, 0.0)
        read = (mean - 1) * shard.kv_prompt_tokens + (square - mean) / 2
        written = shard.kv_prompt_tokens + mean
        memory = np.maximum(read, written) * shard.seconds_per_kv_token
        memory = np.where(self._is_learnt, memory, shard.memory_seconds)
        self.estimated_tokens = np.where(self._is_learnt, np.maximum(np.rint(mean), 1), shard.estimated_tokens).astype(
            np.int64
        )
        self.footprint_tokens = shard.kv_prompt_tokens + square / np.maximum(2 * mean, 1)
        remaining = self._scanner.remaining
        units = shard.unit_id - int(shard.unit_id.min(initial=0))
        unit_compute = np.bincount(units[remaining], compute[remaining], minlength=int(units.max(initial=0)) + 1)
        unit_memory = np.bincount(units[remaining], memory[remaining], minlength=len(unit_compute))
        density = (unit_compute / np.maximum(unit_memory, 1e-300))[units]
        first = np.full(len(unit_compute), len(units))
        np.minimum.at(first, units[remaining], np.arange(len(remaining)))
        order = np.lexsort((np.arange(len(remaining)), first[units[remaining]], -density[remaining]))
        self._scanner.revise(remaining[order], compute, memory, density)


def surplus(
    held_tokens: NDArray[np.int64], remaining_tokens: NDArray[np.int64], capacity_tokens: float
) -> NDArray[np.int64]:
    """Which requests had better begin again later, because together they will outgrow `capacity_tokens`.

    Arrays [num_requests]: what each holds and how many tokens it is expected to have to go; all grow by one a step.
    Those that hold least are given up first: as few as it takes.
    """
    cheapest_first = np.argsort(held_tokens, kind="stable")
    low, high = 0, max(len(held_tokens) - 1, 0)  # one goes on whatever it takes
    while low < high:
        middle = (low + high) // 2
        kept = cheapest_first[middle:]
        if _peak_tokens(held_tokens[kept], remaining_tokens[kept]) <= capacity_tokens:
            high = middle
        else:
            low = middle + 1
    return cheapest_first[:low]


def _peak_tokens(held_tokens: NDArray[np.int64], remaining_tokens: NDArray[np.int64]) -> int:
    """The most that the requests will hold together; use peaks just before one ends."""
    order = np.argsort(remaining_tokens)
    held, remaining = held_tokens[order], remaining_tokens[order]
    still_held = held.sum() - np.cumsum(held) + held
    return int((still_held + np.arange(len(held), 0, -1) * remaining).max(initial=0))


@dataclass(frozen=True, slots=True)
class ClassMoments:
    """By class: how many were observed, mean and mean square of their lengths, and what a running one has to go."""

    count: NDArray[np.float64]
    mean: NDArray[np.float64]
    mean_square: NDArray[np.float64]
    rest: NDArray[np.float64]


def class_moments(
    sums: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    is_observed: NDArray[np.bool_],
    is_censored: NDArray[np.bool_],
    lengths: NDArray[np.float64],
) -> ClassMoments:
    """Moments over the observed requests of each class; `sums` adds up values [num_requests] by class.

    A cut-off length is censored: when others may run on beyond it, its length is what it has plus the mean time to an
    end seen in its class (the estimate for a constant chance of ending at each token), which varies by as much again.
    Where hardly any has ended that says little, so it is at most a few times what has been seen.
    """
    known = np.where(is_observed, lengths, 0.0)
    is_censored = is_censored & is_observed
    censored = np.where(is_censored, known, 0.0)
    num_observed, num_censored = sums(is_observed.astype(np.float64)), sums(is_censored.astype(np.float64))
    total, total_square = sums(known), sums(known**2)
    count = np.maximum(num_observed, 1.0)
    most = _MAX_EXTRAPOLATION * np.sqrt(total_square / count)
    rest = np.minimum(total / np.maximum(num_observed - num_censored, 1.0), most)
    # (length + rest)^2 + rest^2, summed over the censored ones
    square = total_square + 2 * rest * sums(censored) + 2 * num_censored * rest**2
    return ClassMoments(num_observed, (total + num_censored * rest) / count, square / count, rest)


def clip_moments(
    mean: NDArray[np.float64], square: NDArray[np.float64], limits: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Moments of a length that lies in [1, limit]: E[d]^2 <= E[d^2] <= limit * E[d]."""
    mean = np.clip(mean, 1.0, limits)
    return mean, np.clip(square, mean**2, limits * mean)


def sums_by(classes: NDArray[np.int64]) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """Adds up values [num_requests] by the class of each request."""
    num_classes = int(classes.max(initial=-1)) + 1

    def sums(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(classes, weights=values, minlength=num_classes).astype(np.float64)

    return sums
