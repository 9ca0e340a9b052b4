"""How long each completion will be, as well as it can be known before it runs: a hint, the sample, or max_tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blendserve.planner.prefix_tree import ROOT, PrefixTree

MIN_SAMPLES = 4  # a subtree with fewer finished requests takes its nearest ancestor's figures
_MAX_EXTRAPOLATION = 8.0
SOURCES = np.array(["hint", "sample", "history", "max_tokens"])
_HINT, _SAMPLE, _HISTORY, _MAX_TOKENS = range(4)


@dataclass(frozen=True, slots=True)
class RememberedLengths:
    """Mean and mean square output length [num_requests] in earlier runs of the same job; NaN where they say nothing."""

    mean: NDArray[np.float64]
    mean_square: NDArray[np.float64]

    @property
    def is_known(self) -> NDArray[np.bool_]:
        return ~np.isnan(self.mean)


@dataclass(frozen=True, slots=True)
class OutputLengths:
    """Mean and mean square of each request's output tokens (float64) and where they come from (index in SOURCES)."""

    mean: NDArray[np.float64]
    mean_square: NDArray[np.float64]
    source: NDArray[np.int64]

    def take(self, rows: NDArray[np.int64]) -> OutputLengths:
        """The lengths of `rows`."""
        return OutputLengths(self.mean[rows], self.mean_square[rows], self.source[rows])

    def footprint_tokens(self, num_prompt_tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """KV cache tokens that each request holds on average over its life, whatever the moment one looks.

        Long ones are met more often: that is half the mean square over the mean, not half the mean.
        """
        return num_prompt_tokens + self.mean_square / np.maximum(2 * self.mean, 1)

    @property
    def estimated_tokens(self) -> NDArray[np.int32]:
        return np.maximum(np.rint(self.mean), 1).astype(np.int32)


def estimate_output_lengths(
    tree: PrefixTree,
    *,
    num_prompt_tokens: NDArray[np.int64],
    max_tokens: NDArray[np.int64],
    hints: NDArray[np.float64],
    observed: NDArray[np.float64],
    is_cut_off: NDArray[np.bool_],
    ignore_eos: bool,
    remembered: RememberedLengths | None = None,
) -> OutputLengths:
    """Estimate every request of `tree`; all arrays [num_requests] in its order, NaN where nothing is known.

    `observed` are requests' output tokens; where `is_cut_off`, the completion was ended or is still running, so the
    length is at least that. A hint goes before `remembered`, that before
    what is observed. Estimates lie in [1, max_tokens]; with `ignore_eos` every completion has max_tokens tokens.
    """
    limits = np.maximum(max_tokens, 1).astype(np.float64)
    mean, square = limits.copy(), limits**2
    source = np.full(len(limits), _MAX_TOKENS)
    if ignore_eos:
        return OutputLengths(mean, square, source)
    if not bool(np.all(np.isnan(observed))):
        sampled_mean, sampled_square = _nearest_sampled_moments(tree, num_prompt_tokens, limits, observed, is_cut_off)
        mean, square = _clip_moments(sampled_mean, sampled_square, limits)
        source[:] = _SAMPLE
    if remembered is not None:
        known = remembered.is_known
        mean[known], square[known] = _clip_moments(remembered.mean[known], remembered.mean_square[known], limits[known])
        source[known] = _HISTORY
    has_hint = ~np.isnan(hints)
    hinted = np.clip(hints[has_hint], 1.0, limits[has_hint])
    mean[has_hint], square[has_hint], source[has_hint] = hinted, hinted**2, _HINT
    return OutputLengths(mean, square, source)


def prompt_length_class(num_prompt_tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """The power of two above each prompt: those without a prefix in common differ in kind by their length."""
    return np.frexp(np.maximum(num_prompt_tokens, 1).astype(np.float64))[1].astype(np.int64)


def _nearest_sampled_moments(
    tree: PrefixTree,
    num_prompt_tokens: NDArray[np.int64],
    limits: NDArray[np.float64],
    observed: NDArray[np.float64],
    is_cut_off: NDArray[np.bool_],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and mean square, per request, over the samples that are most like it and enough.

    Those of its nearest ancestor that has enough of them; where the samples that have this very ancestor include enough
    with prompts about as long, only these: below the root stands all that shares nothing, whatever it is.
    """
    is_sampled = ~np.isnan(observed)
    lengths = np.where(is_sampled, observed, 0.0)
    is_censored = is_sampled & is_cut_off & (lengths < limits.max(initial=1.0))
    count = tree.sums(is_sampled.astype(np.float64))
    node = tree.leaf_node.copy()
    lacking = np.flatnonzero((count[node] < MIN_SAMPLES) & (node != ROOT))
    while len(lacking):
        node[lacking] = tree.parent[node[lacking]]
        lacking = lacking[(count[node[lacking]] < MIN_SAMPLES) & (node[lacking] != ROOT)]
    means, squares = _moments(tree.sums, is_sampled, is_censored, lengths, node)
    alike = np.unique(node * 64 + prompt_length_class(num_prompt_tokens), return_inverse=True)[1].reshape(-1)
    num_classes = int(alike.max(initial=-1)) + 1

    def sums(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(alike, weights=values, minlength=num_classes).astype(np.float64)

    class_means, class_squares = _moments(sums, is_sampled, is_censored, lengths, alike)
    is_enough = sums(is_sampled.astype(np.float64))[alike] >= MIN_SAMPLES
    return np.where(is_enough, class_means, means), np.where(is_enough, class_squares, squares)


def _moments(
    sums: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    is_sampled: NDArray[np.bool_],
    is_censored: NDArray[np.bool_],
    lengths: NDArray[np.float64],
    group: NDArray[np.int64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and mean square [num_requests] over the samples of each request's `group`; `sums` adds up by group.

    A cut-off sample is censored: when others may run on beyond it, its length is what it has plus the mean time to an
    end seen in its group (the estimate for a constant chance of ending at each token), which varies by as much again.
    Where hardly any has ended that says little, so it is at most a few times what has been seen.
    """
    count = np.maximum(sums(is_sampled.astype(np.float64)), 1.0)
    ended = np.maximum(sums((is_sampled & ~is_censored).astype(np.float64)), 1.0)
    most = _MAX_EXTRAPOLATION * np.sqrt(sums(lengths**2) / count)
    rest = np.where(is_censored, np.minimum(sums(lengths) / ended, most)[group], 0.0)
    mean = sums(lengths + rest) / count
    square = sums((lengths + rest) ** 2 + rest**2) / count
    return mean[group], square[group]


def _clip_moments(
    mean: NDArray[np.float64], square: NDArray[np.float64], limits: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Moments of a length that lies in [1, limit]: E[d]^2 <= E[d^2] <= limit * E[d]."""
    mean = np.clip(mean, 1.0, limits)
    return mean, np.clip(square, mean**2, limits * mean)
