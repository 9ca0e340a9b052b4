"""Which requests are likely to have outputs of about the same length: those of a subtree, and prompts about as long."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from blendserve.planner.prefix_tree import ROOT, PrefixTree

_SUBTREE_SIZES: Final = (4, 64, 1024)  # requests; beyond these the whole job


def prompt_length_class(num_prompt_tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """The power of two above each prompt: those without a prefix in common differ in kind by their length."""
    return np.frexp(np.maximum(num_prompt_tokens, 1).astype(np.float64))[1].astype(np.int64)


def prompt_length_classes(
    group: NDArray[np.int64], num_prompt_tokens: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Classes within each `group` [num_requests], by prompts just as long and by those about as long.

    Just as long: what fills in a form, or a machine wrote, often has one length for each kind.
    """
    longest = int(num_prompt_tokens.max(initial=0)) + 1
    exactly = np.unique(group * longest + num_prompt_tokens, return_inverse=True)[1].reshape(-1)
    about = np.unique(group * 64 + prompt_length_class(num_prompt_tokens), return_inverse=True)[1].reshape(-1)
    return exactly, about


def length_classes(tree: PrefixTree, num_prompt_tokens: NDArray[np.int64]) -> NDArray[np.int32]:
    """int32 [num_requests, num_levels]: the classes of each request, finest first; the last one holds all."""
    levels: list[NDArray[np.int64]] = []
    node = tree.leaf_node
    for size in (*_SUBTREE_SIZES, tree.num_requests[ROOT] + 1):
        node = _ancestor_of_size(tree, node, int(size))
        levels += [*prompt_length_classes(node, num_prompt_tokens), node]
    distinct = [
        level for place, level in enumerate(levels) if place < 3 or not np.array_equal(level, levels[place - 3])
    ]
    return np.stack(distinct, axis=1).astype(np.int32)


def _ancestor_of_size(tree: PrefixTree, node: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """The nearest node above or at each of `node` that holds at least `size` requests, or the root."""
    while len(small := np.flatnonzero((tree.num_requests[node] < size) & (node != ROOT))):
        node = node.copy()
        node[small] = tree.parent[node[small]]
    return node
