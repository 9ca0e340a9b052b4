"""Which requests say most about output lengths when they run first, and which others to run beside them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from blendserve.planner.length_classes import prompt_length_class

MIN_SAMPLED = 16
# A sampled request is stopped after so many output tokens and goes on in its shard: by then it has told its kind, and
# waiting for the longest ones would take as long as a good part of a shard.
SAMPLE_TOKENS = 1024
_MAX_COMPANION_SHARE = 0.03  # of the prompt tokens that aren't shared
_MAX_STRATUM_SHARE = 0.05
_MIN_STRATUM_ROOM = 8
_STANDS_OUT = 4.0  # times as many prompts of one length as there are of each length about as long
ASSUMED_OUTPUT_TOKENS = 512  # before anything is known; a longer one is the engine's to absorb


def choose_companions(
    shared_prefix_tokens: NDArray[np.int64],
    num_prompt_tokens: NDArray[np.int64],
    candidates: NDArray[np.int64],
    *,
    max_tokens: float,
) -> NDArray[np.int64]:
    """Those of the sorted places `candidates` that prefill most tokens of their own, `max_tokens` in all: as much as
    runs in the shadow of the sample's decode steps."""
    shared = np.maximum(shared_prefix_tokens, np.append(shared_prefix_tokens[1:], 0))
    own = num_prompt_tokens - shared
    longest_first = candidates[np.argsort(-own[candidates], kind="stable")]
    max_tokens = min(max_tokens, _MAX_COMPANION_SHARE * float(own.sum()))
    num_chosen = np.searchsorted(np.cumsum(own[longest_first]), max_tokens, side="right")
    return longest_first[:num_chosen]


def draw_stratified(
    shared_prefix_tokens: NDArray[np.int64],
    num_prompt_tokens: NDArray[np.int64],
    candidates: NDArray[np.int64],
    num_sampled: int,
) -> NDArray[np.int64]:
    """`num_sampled` of the sorted places `candidates` (at most all of them), ascending; always the same ones.

    Strata are the subtrees below what all prompts share; prompts that share no more are put together by their length:
    those of one length where it is a common one, else those about as long.
    Each stratum gets room by the square root of its size, so that small ones are seen and big ones are seen more often,
    but not so much that a good part of a small one runs before it can be planned. Within a stratum the sample is spread
    evenly.
    """
    num_sampled = min(num_sampled, len(candidates))
    candidates, stratum = _strata(shared_prefix_tokens, num_prompt_tokens, candidates)
    sizes = np.bincount(stratum)
    least = np.minimum(sizes, _MIN_STRATUM_ROOM) * min(num_sampled / (2 * _MIN_STRATUM_ROOM * len(sizes)), 1.0)
    room = least + (num_sampled - least.sum()) * np.sqrt(sizes) / np.sqrt(sizes).sum()
    room = np.minimum(room, np.maximum(_MAX_STRATUM_SHARE * sizes, _MIN_STRATUM_ROOM))
    filled = np.cumsum((room / np.maximum(sizes, 1))[stratum])
    marks = _spread(float(filled[-1]), min(round(float(filled[-1])), num_sampled))
    chosen = np.unique(np.minimum(np.searchsorted(filled, marks), len(candidates) - 1))
    others = np.setdiff1d(np.arange(len(candidates)), chosen)
    more = others[_spread(len(others), num_sampled - len(chosen)).astype(np.int64)]
    return np.sort(candidates[np.concatenate([chosen, more])])


def _strata(
    shared_prefix_tokens: NDArray[np.int64], num_prompt_tokens: NDArray[np.int64], candidates: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`candidates` sorted by stratum, and the stratum of each, numbered in that order."""
    least_shared = shared_prefix_tokens[1:].min(initial=int(shared_prefix_tokens.max(initial=0)))
    subtree = np.cumsum(shared_prefix_tokens <= least_shared)
    is_alone = np.bincount(subtree)[subtree] == 1
    key = np.where(is_alone, -1 - _length_stratum(num_prompt_tokens, is_alone), subtree)[candidates]
    order = np.argsort(key, kind="stable")
    return candidates[order], np.unique(key[order], return_inverse=True)[1].reshape(-1)


def _length_stratum(num_prompt_tokens: NDArray[np.int64], is_alone: NDArray[np.bool_]) -> NDArray[np.int64]:
    """What prompts that stand alone are told apart by: a length that stands out among those about as long, or that."""
    about = prompt_length_class(num_prompt_tokens)
    num_just_as_long = np.bincount(num_prompt_tokens[is_alone], minlength=int(num_prompt_tokens.max(initial=0)) + 1)
    per_length = np.bincount(about[is_alone], minlength=64) / 2.0 ** np.maximum(np.arange(64) - 1, 0)
    least = np.maximum(_STANDS_OUT * per_length[about], _MIN_STRATUM_ROOM)
    return np.where(num_just_as_long[num_prompt_tokens] >= least, 64 + num_prompt_tokens, about)


def _spread(length: float, num_marks: int) -> NDArray[np.float64]:
    """`num_marks` evenly spaced marks on [0, length)."""
    return np.arange(0.5, num_marks, dtype=np.float64) * (length / max(num_marks, 1))
