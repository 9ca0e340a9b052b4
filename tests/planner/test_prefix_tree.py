"""The prefix tree against brute force: common prefixes to the token, nodes, sums, the way back to the prompts."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blendserve.planner import sorted_prompts
from blendserve.planner.prefix_tree import build_prefix_tree, range_minimum
from blendserve.planner.sorted_prompts import sort_prompts

PROMPTS = st.lists(st.lists(st.integers(-1, 2), max_size=7), max_size=25)
LONG_PROMPTS = st.lists(st.lists(st.integers(0, 1), max_size=700), max_size=8)


def shared_with_previous(prompts: list[list[int]]) -> np.ndarray:
    return np.array(
        [0] * bool(prompts) + [common_prefix_length(list(pair)) for pair in pairwise(prompts)], dtype=np.int64
    )


def common_prefix_length(prompts: list[list[int]]) -> int:
    length = 0
    while all(len(prompt) > length and prompt[length] == prompts[0][length] for prompt in prompts):
        length += 1
    return length


def brute_force_nodes(prompts: list[list[int]]) -> set[tuple[int, int, int]]:
    """(depth, first, count) of the root and of each deepest prefix that a set of two or more requests shares."""
    nodes = {(0, 0, len(prompts))}
    for prefix in {tuple(prompt[:depth]) for prompt in prompts for depth in range(1, len(prompt) + 1)}:
        members = [place for place, prompt in enumerate(prompts) if tuple(prompt[: len(prefix)]) == prefix]
        if len(members) > 1 and common_prefix_length([prompts[place] for place in members]) == len(prefix):
            nodes.add((len(prefix), members[0], len(members)))
    return nodes


@settings(deadline=None)
@given(prompts=PROMPTS)
def test_nodes_are_those_of_brute_force(prompts):
    prompts = sorted(prompts)
    tree = build_prefix_tree(shared_with_previous(prompts))
    nodes = list(zip(tree.depth_tokens, tree.first_position, tree.num_requests, strict=True))
    assert len(nodes) == len(set(nodes))
    assert {tuple(int(value) for value in node) for node in nodes} == brute_force_nodes(prompts)
    for node in range(1, tree.num_nodes):
        parent = tree.parent[node]
        assert parent < node
        assert tree.depth_tokens[parent] < tree.depth_tokens[node]
        assert tree.first_position[parent] <= tree.first_position[node]
    for place, leaf in enumerate(tree.leaf_node):
        holding = [node for node, (_, first, count) in enumerate(nodes) if first <= place < first + count]
        assert leaf == max(holding, key=lambda node: nodes[node][0])


@settings(deadline=None)
@given(prompts=PROMPTS)
def test_the_tree_gives_back_the_prompts(prompts):
    prompts = sorted(prompts)
    tree = build_prefix_tree(shared_with_previous(prompts))
    for place, prompt in enumerate(prompts):
        edges, node = [], int(tree.leaf_node[place])
        own = prompt[int(tree.depth_tokens[node]) :]
        while node:
            any_member = prompts[int(tree.first_position[node])]
            edges.append(any_member[int(tree.depth_tokens[tree.parent[node]]) : int(tree.depth_tokens[node])])
            node = int(tree.parent[node])
        assert [token for edge in reversed(edges) for token in edge] + own == prompt


@settings(deadline=None)
@given(prompts=PROMPTS)
def test_sums_over_nodes_and_along_paths(prompts):
    prompts = sorted(prompts)
    tree = build_prefix_tree(shared_with_previous(prompts))
    values = np.arange(len(prompts), dtype=np.float64) + 1
    for node in range(tree.num_nodes):
        first, count = tree.first_position[node], tree.num_requests[node]
        assert tree.sums(values)[node] == values[first : first + count].sum()
    edges = (tree.depth_tokens - tree.depth_tokens[tree.parent]).astype(np.float64)
    assert tree.accumulate_from_root(edges).tolist() == tree.depth_tokens.tolist()


def test_a_chain_as_deep_as_it_is_long():
    # Each prompt is the one before and one token more: the deepest tree that there can be.
    tree = build_prefix_tree(np.arange(5000))
    assert tree.num_nodes == 5000
    assert tree.parent.tolist() == [0, *range(4999)]


@settings(max_examples=40, deadline=None)
@given(prompts=PROMPTS | LONG_PROMPTS, data=st.data())
def test_sorted_prompts_are_those_of_python(tmp_path_factory, prompts, data):
    # Copies of a prompt, cut or gone on with, share more than is compared at one time.
    prompts = prompts + [[*prompt, 5] for prompt in prompts] + [prompt[: len(prompt) // 2] for prompt in prompts]
    prompts = data.draw(st.permutations(prompts))
    folder = tmp_path_factory.mktemp("prompts")
    pq.write_table(pa.table({"prompt_token_ids": pa.array(prompts, pa.list_(pa.int32()))}), folder / "p.parquet")
    found = sort_prompts(folder / "p.parquet", folder)
    expected = sorted(range(len(prompts)), key=lambda place: (prompts[place], place))
    assert found.file_position.tolist() == expected
    assert found.num_prompt_tokens.tolist() == [len(prompts[place]) for place in expected]
    assert found.shared_prefix_tokens.tolist() == shared_with_previous([prompts[place] for place in expected]).tolist()


def test_prompts_that_end_sort_before_those_that_go_on_with_the_least_number(tmp_path):
    least = np.iinfo(np.int32).min  # what stands for the tokens beyond a prompt's end
    prompts = [[1, least, 5], [1, least], [1], [1, least, least], [1]]
    pq.write_table(pa.table({"prompt_token_ids": pa.array(prompts, pa.list_(pa.int32()))}), tmp_path / "p.parquet")
    found = sort_prompts(tmp_path / "p.parquet", tmp_path)
    assert found.file_position.tolist() == [2, 4, 1, 3, 0]
    assert found.shared_prefix_tokens.tolist() == [0, 1, 1, 2, 2]


@pytest.mark.parametrize("ending", [[], [7, 7]])
def test_prompts_that_begin_alike_for_ever_longer_are_sorted_in_few_rounds(tmp_path, monkeypatch, ending):
    base = np.random.default_rng(0).integers(0, 5, 400).tolist()
    prompts = [base[:length] + ending for length in np.random.default_rng(1).permutation(400).tolist()]
    pq.write_table(pa.table({"prompt_token_ids": pa.array(prompts, pa.list_(pa.int32()))}), tmp_path / "p.parquet")
    rounds = []
    split = sorted_prompts._split_groups
    monkeypatch.setattr(sorted_prompts, "_split_groups", lambda *given: rounds.append(1) or split(*given))
    found = sort_prompts(tmp_path / "p.parquet", tmp_path)
    assert found.file_position.tolist() == sorted(range(400), key=lambda place: prompts[place])
    assert len(rounds) <= 12  # four tokens a round would take a hundred


@settings(deadline=None)
@given(values=st.lists(st.integers(0, 9), min_size=1, max_size=40), data=st.data())
def test_range_minimum(values, data):
    ranges = data.draw(st.lists(st.tuples(*[st.integers(0, len(values) - 1)] * 2).map(sorted), max_size=20))
    first = np.array([pair[0] for pair in ranges], dtype=np.int64)
    last = np.array([pair[1] for pair in ranges], dtype=np.int64)
    expected = [min(values[low : high + 1]) for low, high in ranges]
    assert range_minimum(np.array(values), first, last).tolist() == expected
