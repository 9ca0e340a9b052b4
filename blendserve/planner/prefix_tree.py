"""The prefix tree over sorted prompts, built from the common-prefix lengths of neighbours; it never sees a token.

A node is an interval of the sorted order, so that everything a node sums up is a difference of two prefix sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from blendserve.schemas import PREFIX_NODES

ROOT = 0


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """Nodes in depth-first order; node 0 is the root, which holds all requests at depth 0 and is its own parent.

    parent, depth_tokens, first_position, num_requests: int64 [num_nodes].
    leaf_node: int64 [num_requests], the deepest node that holds each request (its leaf hangs below that node).
    """

    parent: NDArray[np.int64]
    depth_tokens: NDArray[np.int64]
    first_position: NDArray[np.int64]
    num_requests: NDArray[np.int64]
    leaf_node: NDArray[np.int64]

    @property
    def num_nodes(self) -> int:
        return len(self.parent)

    def sums(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """[num_nodes]: the sum over each node's requests of `values` [num_requests], given in sorted order."""
        total = np.concatenate([np.zeros(1), np.cumsum(values, dtype=np.float64)])
        sums: NDArray[np.float64] = total[self.first_position + self.num_requests] - total[self.first_position]
        return sums

    def accumulate_from_root(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """[num_nodes]: the sum of `values` [num_nodes] over each node and its ancestors, the root's value left out."""
        result: NDArray[np.float64] = values.astype(np.float64)
        result[ROOT] = 0.0
        ancestor = self.parent
        while bool(np.any(ancestor != ROOT)):  # distances double: log2(height) rounds
            result = result + result[ancestor]
            ancestor = ancestor[ancestor]
        return result

    def to_table(self) -> pa.Table:
        """The tree as the relation `prefix_nodes`."""
        node_id = np.arange(self.num_nodes)
        depth_of_parent = self.depth_tokens[self.parent]
        return pa.table(
            {
                "node_id": node_id,
                "parent_id": pa.array(self.parent, mask=node_id == ROOT),
                "depth_tokens": self.depth_tokens.astype(np.int32),
                "edge_tokens": (self.depth_tokens - depth_of_parent).astype(np.int32),
                "first_position": self.first_position,
                "num_requests": self.num_requests,
            },
            schema=PREFIX_NODES,
        )


def build_prefix_tree(shared_prefix_tokens: NDArray[np.integer]) -> PrefixTree:
    """The tree whose inner nodes are the maximal intervals of at least two requests that share a prefix.

    `shared_prefix_tokens` [num_requests] is the common prefix of each sorted request with the one before it.
    """
    num_requests = len(shared_prefix_tokens)
    shared = np.concatenate([shared_prefix_tokens.astype(np.int64), np.full(1, -1)])
    shared[0] = -1
    first, end = _previous_smaller(shared), num_requests - _previous_smaller(shared[::-1])[::-1]
    inside = np.flatnonzero(shared > 0)
    depths = shared[inside]
    stride = int(depths.max(initial=0)) + 1
    keys, chosen, node_of_inside = np.unique(first[inside] * stride + depths, return_index=True, return_inverse=True)
    node_at = np.full(num_requests + 1, ROOT)  # the node whose depth the common prefix at a position is
    node_at[inside] = node_of_inside.reshape(-1) + 1
    first, end = first[inside][chosen], end[inside][chosen]
    is_before_deeper = shared[first] >= shared[end]
    return PrefixTree(
        parent=np.concatenate([np.zeros(1, np.int64), np.where(is_before_deeper, node_at[first], node_at[end])]),
        depth_tokens=np.concatenate([np.zeros(1, np.int64), keys % stride]),
        first_position=np.concatenate([np.zeros(1, np.int64), first]),
        num_requests=np.concatenate([np.full(1, num_requests), end - first]),
        leaf_node=np.where(shared[:-1] >= shared[1:], node_at[:-1], node_at[1:]),
    )


def _previous_smaller(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """[n]: the last position before each one that holds a smaller value; 0 for the first position.

    `values[0]` must be the smallest. All between a position and its candidate are at least as large, so a candidate
    that is too large is replaced by its own candidate: distances double along runs.
    """
    previous = np.maximum(np.arange(len(values)) - 1, 0)
    active = np.flatnonzero((values[previous] >= values) & (previous > 0))
    while len(active):
        previous[active] = previous[previous[active]]
        candidates = previous[active]
        active = active[(values[candidates] >= values[active]) & (candidates > 0)]
    return previous


def range_minimum(
    values: NDArray[np.integer], first: NDArray[np.int64], last: NDArray[np.int64]
) -> NDArray[np.integer]:
    """[num_ranges]: the least of `values[first[i] : last[i] + 1]`, never empty; O(n log n) time, O(n) space."""
    result = np.empty(len(first), dtype=values.dtype)
    power = np.frexp((last - first + 1).astype(np.float64))[1] - 1  # floor(log2(length))
    level = values
    for exponent in range(int(power.max(initial=-1)) + 1):
        here = np.flatnonzero(power == exponent)
        width = 1 << exponent
        result[here] = np.minimum(level[first[here]], level[last[here] - width + 1])
        level = np.minimum(level[:-width], level[width:])
    return result
