"""Sorting and cutting the prefix tree: no request lost, sharing kept, cuts only where the density disagrees."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from blendserve.planner.prefix_tree import build_prefix_tree
from blendserve.planner.schedule import PlannedRequests, schedule_requests, shared_with_previous
from blendserve.planner.units import cut_into_units, order_by_density


def simple_costs(*, num_prompt_tokens, shared_prefix_tokens, mean_output_tokens, mean_square_output_tokens):
    """A stand-in for the SQL: a second per prefilled token, a second per token read."""
    compute = (num_prompt_tokens - shared_prefix_tokens + np.maximum(mean_output_tokens - 1, 0)).astype(np.float64)
    memory = mean_output_tokens * num_prompt_tokens * 0.1 + mean_square_output_tokens * 0.05
    return compute, np.maximum(memory, 1e-3)


def requests_of(shared: list[int], prompts: list[int], outputs: list[float]) -> PlannedRequests:
    return PlannedRequests(
        num_prompt_tokens=np.array(prompts),
        shared_prefix_tokens=np.array(shared),
        mean_output_tokens=np.array(outputs, dtype=np.float64),
        mean_square_output_tokens=np.array(outputs, dtype=np.float64) ** 2,
        arrival=np.arange(len(prompts)),
    )


def schedule(requests: PlannedRequests, policy="blend", num_shards=1):
    return schedule_requests(requests, policy=policy, seed=0, num_shards=num_shards, costs=simple_costs)


@st.composite
def generated_trees(draw):
    """Groups under a prefix of their own, each with its own length of outputs, some with outliers."""
    base = draw(st.integers(0, 30))
    groups = draw(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 400), st.integers(1, 2000)), max_size=12))
    outlier = draw(st.integers(1, 3000))
    shared, prompts, outputs = [], [], []
    for size, depth, output in groups:
        for member in range(size):
            shared.append(base + depth if member else base)
            prompts.append(base + depth + 5 + member)
            outputs.append(outlier if member == size // 2 else output)
    if shared:
        shared[0] = 0
    return requests_of(shared, prompts, outputs)


@settings(max_examples=150, deadline=None)
@given(requests=generated_trees())
def test_blend_is_a_permutation_that_keeps_the_sharing(requests):
    plan = schedule(requests)
    assert sorted(plan.positions.tolist()) == list(range(requests.num_requests))  # childless nodes aren't dropped
    assert plan.shared_prefix_tokens.sum() >= 0.99 * requests.shared_prefix_tokens.sum()
    assert np.all(np.diff(plan.unit_density) <= 0)


@settings(deadline=None)
@given(requests=generated_trees())
def test_order_by_density_is_a_depth_first_walk(requests):
    tree = build_prefix_tree(requests.shared_prefix_tokens)
    count = requests.num_requests
    compute, memory = np.arange(count) % 5 + 1.0, np.arange(count) % 3 + 1.0
    order = order_by_density(tree, compute, memory)
    assert sorted(order.positions.tolist()) == list(range(count))
    assert order.shared_prefix_tokens.sum() == requests.shared_prefix_tokens.sum()
    assert order.shared_prefix_tokens.tolist() == (
        shared_with_previous(requests.shared_prefix_tokens, order.positions).tolist()
    )


def test_only_outliers_are_split_off():
    # Cheap to split everywhere: read literally, every child would go to the root, as its prefix is short.
    alike = requests_of([0] + [40] * 499 + [0] + [40] * 499, [80] * 1000, [10.0] * 500 + [400.0] * 500)
    assert len(np.unique(schedule(alike).unit_id)) == 2
    outputs = alike.mean_output_tokens.copy()
    outputs[100:110] = 2000.0  # outliers inside the first subtree
    mixed = requests_of(alike.shared_prefix_tokens.tolist(), [80] * 1000, outputs.tolist())
    plan = schedule(mixed)
    assert len(np.unique(plan.unit_id)) == 3
    assert set(plan.positions[-10:].tolist()) == set(range(100, 110))
    assert plan.shared_prefix_tokens.sum() >= 0.99 * mixed.shared_prefix_tokens.sum()


def test_a_split_that_costs_too_much_is_not_made():
    requests = requests_of([0, 1000, 1000, 1000, 0], [1001] * 4 + [5], [500.0, 500.0, 1.0, 1.0, 9000.0])
    plan = schedule(requests)
    assert len(np.unique(plan.unit_id)) == 2
    assert plan.shared_prefix_tokens.sum() == 3000
    assert plan.positions.tolist() == [2, 3, 0, 1, 4]  # free: the order of a node's children costs no sharing


def test_what_everybody_shares_is_no_reason_to_stay_together():
    # A chat template in front of every prompt: any order keeps it, so every request is free to move.
    requests = requests_of([0] + [20] * 9, [50] * 10, [1.0, 900.0] * 5)
    plan = schedule(requests)
    assert len(np.unique(plan.unit_id)) == 10
    assert plan.positions.tolist() == [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]


def test_no_requests_have_no_units():
    empty = np.zeros(0)
    order = order_by_density(build_prefix_tree(np.zeros(0, np.int64)), empty, empty)
    assert cut_into_units(order, empty, empty).tolist() == []


def test_policies_order_as_their_names_say():
    requests = requests_of([0, 3, 0, 2], [5, 6, 7, 8], [4.0, 9.0, 9.0, 1.0])
    assert schedule(requests, "dfs").positions.tolist() == [0, 1, 2, 3]
    assert schedule(requests, "longest").positions.tolist() == [1, 2, 0, 3]
    assert sorted(schedule(requests, "random").positions.tolist()) == [0, 1, 2, 3]
    assert schedule(requests, "random").positions.tolist() == schedule(requests, "random").positions.tolist()
