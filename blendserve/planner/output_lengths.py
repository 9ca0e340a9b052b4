"""How long each completion will be, as well as it can be known before it runs: a hint, the sample, or max_tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blendserve.length_learning import MIN_SAMPLES, class_moments, clip_moments, sums_by
from blendserve.planner.length_classes import prompt_length_classes
from blendserve.planner.prefix_tree import ROOT, PrefixTree

SOURCES = np.array(["fixed", "hint", "sample", "history", "max_tokens"])
FIXED, HINT, SAMPLE, HISTORY, MAX_TOKENS = range(5)


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
    length is at least that. A hint goes before `remembered`, that before what is observed. Estimates lie in
    [1, max_tokens]; a length is fixed where that is one token, and with `ignore_eos`, when it is max_tokens.
    """
    limits = np.maximum(max_tokens, 1).astype(np.float64)
    mean, square = limits.copy(), limits**2
    if ignore_eos:
        return OutputLengths(mean, square, np.full(len(limits), FIXED))
    source = np.full(len(limits), MAX_TOKENS)
    if not bool(np.all(np.isnan(observed))):
        sampled_mean, sampled_square = _nearest_sampled_moments(tree, num_prompt_tokens, limits, observed, is_cut_off)
        mean, square = clip_moments(sampled_mean, sampled_square, limits)
        source[:] = SAMPLE
        begun = ~np.isnan(observed) & is_cut_off & (observed < limits)  # the chance of an end is the same at any token
        so_far, rest = observed[begun], mean[begun]
        mean[begun], square[begun] = clip_moments(
            so_far + rest, so_far * (so_far + 2 * rest) + square[begun], limits[begun]
        )
    if remembered is not None:
        known = remembered.is_known
        mean[known], square[known] = clip_moments(remembered.mean[known], remembered.mean_square[known], limits[known])
        source[known] = HISTORY
    has_hint = ~np.isnan(hints)
    hinted = np.clip(hints[has_hint], 1.0, limits[has_hint])
    mean[has_hint], square[has_hint], source[has_hint] = hinted, hinted**2, HINT
    source[limits == 1] = FIXED
    return OutputLengths(mean, square, source)


def _nearest_sampled_moments(
    tree: PrefixTree,
    num_prompt_tokens: NDArray[np.int64],
    limits: NDArray[np.float64],
    observed: NDArray[np.float64],
    is_cut_off: NDArray[np.bool_],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and mean square, per request, over the samples that are most like it and enough.

    Those of its nearest ancestor that has enough of them; where the samples that have this very ancestor include enough
    with prompts about or even just as long, only these: below the root stands all that shares nothing, whatever it is.
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
    found = class_moments(tree.sums, is_sampled, is_censored, lengths)
    means, squares = found.mean[node], found.mean_square[node]
    is_open, is_counted = np.ones(len(node), np.bool_), is_sampled.copy()
    for alike in prompt_length_classes(node, num_prompt_tokens):
        found = class_moments(sums_by(alike), is_counted, is_censored, lengths)
        has_enough = (found.count >= MIN_SAMPLES)[alike]
        taken = is_open & has_enough
        means[taken], squares[taken] = found.mean[alike][taken], found.mean_square[alike][taken]
        is_open &= ~taken
        is_counted &= ~has_enough  # what is known of prompts just as long says nothing of others about as long
    return means, squares
