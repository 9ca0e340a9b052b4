"""Runs of requests that stay together: sort the prefix tree by density, then cut it where the cut is worth its price.

The requests below a node may stand in any order of its children without losing a shared token, so the tree is first
sorted by density at every node. Cutting the resulting order between two neighbours costs one prefill of what they
share beyond what all requests share. Cuts are chosen as a regression tree is grown: each takes away the most
difference between a request's share of compute and that of the run it stands in, for the fewest tokens, until the next
one would take the cost beyond the budget. Leaves are never dropped: every step is a permutation or a cut of one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blendserve.planner.prefix_tree import ROOT, PrefixTree

MAX_SHARING_LOST = 0.009  # of all shared tokens; the rest of one percent is for the cuts between shards
_MIN_GAIN = 1e-6  # of the whole variation; less isn't worth a cut
_MAX_ROUNDS = 64


@dataclass(frozen=True, slots=True)
class DensityOrder:
    """A depth-first order with denser children first.

    positions [num_requests]: the sorted position that stands at each place of this order.
    shared_prefix_tokens [num_requests]: tokens shared with the place before; 0 for the first.
    """

    positions: NDArray[np.int64]
    shared_prefix_tokens: NDArray[np.int64]


def order_by_density(
    tree: PrefixTree, compute_seconds: NDArray[np.float64], memory_seconds: NDArray[np.float64]
) -> DensityOrder:
    """Sort the children of every node by falling density; costs [num_requests] in the tree's order, prefixes spread."""
    num_requests = len(compute_seconds)
    if num_requests == 0:
        return DensityOrder(np.zeros(0, np.int64), np.zeros(0, np.int64))
    inner = np.arange(1, tree.num_nodes)
    parents = np.concatenate([tree.parent[inner], tree.leaf_node])
    compute = np.concatenate([tree.sums(compute_seconds)[inner], compute_seconds])
    memory = np.concatenate([tree.sums(memory_seconds)[inner], memory_seconds])
    sizes = np.concatenate([tree.num_requests[inner], np.ones(num_requests, np.int64)])
    by_density = np.lexsort((-memory, -compute / memory, parents))
    ends = np.cumsum(sizes[by_density])
    begins = ends - sizes[by_density]
    is_first = np.concatenate([np.ones(1, np.bool_), np.diff(parents[by_density]) != 0])
    begins -= begins[is_first][np.cumsum(is_first) - 1]  # now: places after the parent's own first place
    offsets = np.empty(len(parents), np.int64)
    offsets[by_density] = begins
    node_offsets = np.concatenate([np.zeros(1, np.int64), offsets[: len(inner)]])
    node_begins = tree.accumulate_from_root(node_offsets.astype(np.float64)).astype(np.int64)
    places = node_begins[tree.leaf_node] + offsets[len(inner) :]
    positions = np.empty(num_requests, np.int64)
    positions[places] = np.arange(num_requests)
    # Between two neighbours stands exactly one child that isn't the first of its parent: they share the parent's depth.
    shared = np.zeros(num_requests, np.int64)
    later = by_density[~is_first]
    shared[node_begins[parents[later]] + offsets[later]] = tree.depth_tokens[parents[later]]
    return DensityOrder(positions, shared)


def cut_into_units(
    order: DensityOrder, compute_seconds: NDArray[np.float64], memory_seconds: NDArray[np.float64]
) -> NDArray[np.int64]:
    """int64 [num_units]: the places in `order` where units begin; costs are in the order of `order.positions`."""
    num_requests = len(order.positions)
    if num_requests == 0:
        return np.zeros(0, np.int64)
    shared = order.shared_prefix_tokens
    price = shared - shared[1:].min(initial=int(shared.max()))  # tokens to compute again when cut here
    price[0] = 0
    is_begin = price <= 0  # what all requests share is kept at every cut
    budget = MAX_SHARING_LOST * float(shared.sum())
    weight = compute_seconds + memory_seconds
    least_gain = _MIN_GAIN * float(weight.sum())
    for _ in range(_MAX_ROUNDS):
        cuts, gains = _best_cut_in_each_unit(is_begin, compute_seconds, weight)
        worth = (gains > least_gain) & (price[cuts] <= budget)
        cuts, gains = cuts[worth], gains[worth]
        cuts = cuts[np.argsort(-gains / price[cuts], kind="stable")]
        cuts = cuts[np.cumsum(price[cuts]) <= budget]
        if len(cuts) == 0:
            break
        budget -= float(price[cuts].sum())
        is_begin[cuts] = True
    return np.flatnonzero(is_begin)


def _best_cut_in_each_unit(
    is_begin: NDArray[np.bool_], compute_seconds: NDArray[np.float64], weight: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The place in each unit where a cut takes away most weighted variance of compute / weight, and how much."""
    begins = np.flatnonzero(is_begin)
    ends = np.append(begins[1:], len(is_begin))
    unit = np.cumsum(is_begin) - 1
    compute_before = np.concatenate([np.zeros(1), np.cumsum(compute_seconds)])
    weight_before = np.concatenate([np.zeros(1), np.cumsum(weight)])
    left_compute = compute_before[:-1] - compute_before[begins][unit]
    left_weight = weight_before[:-1] - weight_before[begins][unit]
    all_compute = (compute_before[ends] - compute_before[begins])[unit]
    all_weight = (weight_before[ends] - weight_before[begins])[unit]
    right_weight = all_weight - left_weight
    with np.errstate(divide="ignore", invalid="ignore"):  # a unit's own begin has nothing on its left
        gain = (
            left_compute**2 / left_weight
            + (all_compute - left_compute) ** 2 / right_weight
            - all_compute**2 / all_weight
        )
    gain[is_begin] = -np.inf
    gain = np.where(np.isfinite(gain), gain, -np.inf)
    best = np.maximum.reduceat(gain, begins)
    at_best = np.flatnonzero((gain == best[unit]) & ~is_begin & np.isfinite(gain))
    units, first = np.unique(unit[at_best], return_index=True)
    return at_best[first], best[units]


def spread_prefix_costs(
    tree: PrefixTree, node_compute_seconds: NDArray[np.float64], leaf_compute_seconds: NDArray[np.float64]
) -> NDArray[np.float64]:
    """[num_requests]: each request's own compute time plus its part of every prefix above it, divided evenly.

    `node_compute_seconds` [num_nodes] is the prefill of each node's own edge.
    """
    part = node_compute_seconds / np.maximum(tree.num_requests, 1)
    part[ROOT] = 0.0
    spread: NDArray[np.float64] = leaf_compute_seconds + tree.accumulate_from_root(part)[tree.leaf_node]
    return spread
