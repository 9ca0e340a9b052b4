"""How long each completion will be, as well as it can be known before it runs: a hint, the sample, or max_tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blendserve.planner.prefix_tree import ROOT, PrefixTree

MIN_SAMPLES = 4  # a subtree with fewer finished requests takes its nearest ancestor's figures
SOURCES = np.array(["hint", "sample", "max_tokens"])
_HINT, _SAMPLE, _MAX_TOKENS = range(3)


@dataclass(frozen=True, slots=True)
class OutputLengths:
    """Mean and mean square of each request's output tokens (float64) and where they come from (index in SOURCES)."""

    mean: NDArray[np.float64]
    mean_square: NDArray[np.float64]
    source: NDArray[np.int64]

    @property
    def estimated_tokens(self) -> NDArray[np.int32]:
        return np.maximum(np.rint(self.mean), 1).astype(np.int32)


def estimate_output_lengths(
    tree: PrefixTree,
    *,
    max_tokens: NDArray[np.int64],
    hints: NDArray[np.float64],
    observed: NDArray[np.float64],
    is_cut_off: NDArray[np.bool_],
    ignore_eos: bool,
) -> OutputLengths:
    """Estimate every request of `tree`; all arrays [num_requests] in its order, NaN where nothing is known.

    `observed` are finished requests' output tokens; where `is_cut_off`, max_tokens ended the completion, so the length
    is at least that. Estimates lie in [1, max_tokens]; with `ignore_eos` every completion has max_tokens tokens.
    """
    limits = np.maximum(max_tokens, 1).astype(np.float64)
    mean, square = limits.copy(), limits**2
    source = np.full(len(limits), _MAX_TOKENS)
    if ignore_eos:
        return OutputLengths(mean, square, source)
    if not bool(np.all(np.isnan(observed))):
        sampled_mean, sampled_square = _nearest_sampled_moments(tree, limits, observed, is_cut_off)
        mean, square = _clip_moments(sampled_mean, sampled_square, limits)
        source[:] = _SAMPLE
    has_hint = ~np.isnan(hints)
    hinted = np.clip(hints[has_hint], 1.0, limits[has_hint])
    mean[has_hint], square[has_hint], source[has_hint] = hinted, hinted**2, _HINT
    return OutputLengths(mean, square, source)


def _nearest_sampled_moments(
    tree: PrefixTree, limits: NDArray[np.float64], observed: NDArray[np.float64], is_cut_off: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and mean square, per request, over the samples of its nearest ancestor that has enough of them."""
    is_sampled = ~np.isnan(observed)
    count = tree.sums(is_sampled.astype(np.float64))
    node = tree.leaf_node.copy()
    lacking = np.flatnonzero((count[node] < MIN_SAMPLES) & (node != ROOT))
    while len(lacking):
        node[lacking] = tree.parent[node[lacking]]
        lacking = lacking[(count[node[lacking]] < MIN_SAMPLES) & (node[lacking] != ROOT)]
    # A cut-off sample is censored: when others may run on beyond its limit, its length is the limit plus the mean
    # time to an end seen in its subtree (the estimate for a constant chance of ending at each token).
    is_censored = is_sampled & is_cut_off & (limits < limits.max(initial=1.0))
    lengths = np.where(is_sampled, observed, 0.0)
    ended = tree.sums((is_sampled & ~is_cut_off).astype(np.float64))
    rest = tree.sums(lengths) / np.maximum(ended, 1.0)
    lengths = np.where(is_censored, lengths + rest[node], lengths)
    count = np.maximum(count, 1.0)
    return (tree.sums(lengths) / count)[node], (tree.sums(lengths**2) / count)[node]


def _clip_moments(
    mean: NDArray[np.float64], square: NDArray[np.float64], limits: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Moments of a length that lies in [1, limit]: E[d]^2 <= E[d^2] <= limit * E[d]."""
    mean = np.clip(mean, 1.0, limits)
    return mean, np.clip(square, mean**2, limits * mean)
