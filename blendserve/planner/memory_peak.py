"""How full the KV cache will get while requests decode side by side."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def peak_tokens(
    held_tokens: int, own_tokens: NDArray[np.int64], remaining_tokens: NDArray[np.int64], horizon: int
) -> int:
    """The most that the cache will hold within `horizon` steps, a newcomer that decodes that long included.

    `held_tokens` now, the newcomer's prompt included; arrays [num_requests] of the others: what each gives back when it
    ends, and how many tokens it has to go. All grow by a token a step. Use peaks just before one ends; by then those
    with less to go have given back theirs. What comes after the newcomer's end isn't its business: otherwise short
    requests would wait for room that only long ones will need.
    """
    is_ending = remaining_tokens <= horizon
    order = np.argsort(remaining_tokens[is_ending])
    ends = np.append(remaining_tokens[is_ending][order], horizon)
    freed = np.append(0, np.cumsum(own_tokens[is_ending][order]))
    num_growing = len(own_tokens) + 1 - np.arange(len(ends))
    return int((held_tokens - freed + num_growing * ends).max())
