"""Shards: every request in one, compute and memory time both in balance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blendserve.planner.sharding import choose_num_shards, split_from_both_ends, split_in_order

COSTS = st.lists(st.tuples(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3)), min_size=1, max_size=60)


@settings(deadline=None)
@given(costs=COSTS, wanted=st.integers(1, 8), split=st.sampled_from([split_from_both_ends, split_in_order]))
def test_each_request_in_exactly_one_shard_and_none_empty(costs, wanted, split):
    costs = sorted(costs, key=lambda cost: -cost[0] / cost[1])
    compute, memory = np.array(costs).T
    shards = split(compute, memory, min(wanted, len(costs)))
    assert len(shards) == min(wanted, len(costs))
    assert all(len(shard) and np.all(np.diff(shard) > 0) for shard in shards)
    assert sorted(np.concatenate(shards).tolist()) == list(range(len(costs)))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), num_shards=st.integers(2, 8))
def test_both_times_are_balanced(seed, num_shards):
    random = np.random.default_rng(seed)
    compute, memory = random.lognormal(size=2000), random.lognormal(size=2000)
    order = np.argsort(-compute / memory)
    compute, memory = compute[order], memory[order]
    shards = split_from_both_ends(compute, memory, num_shards)
    for seconds in (compute, memory):
        parts = [seconds[shard].sum() for shard in shards]
        assert max(parts) <= seconds.sum() / num_shards + 2 * seconds.max()
        assert min(parts) >= seconds.sum() / num_shards - 2 * seconds.max()


def test_consecutive_cuts_of_a_density_order_would_not_balance_both():
    compute = np.linspace(10, 1, 100)
    memory = np.linspace(1, 10, 100)
    naive = [compute[shard].sum() / memory[shard].sum() for shard in split_in_order(compute, memory, 2)]
    balanced = [compute[shard].sum() / memory[shard].sum() for shard in split_from_both_ends(compute, memory, 2)]
    assert naive[0] > 2 * naive[1]
    assert balanced == pytest.approx([1.0, 1.0], rel=0.02)


def test_number_of_shards():
    assert choose_num_shards(None, predicted_seconds=10, num_requests=100) == 1
    assert choose_num_shards(None, predicted_seconds=5401, num_requests=100) == 4
    assert choose_num_shards(None, predicted_seconds=1e9, num_requests=3) == 3
    assert choose_num_shards(5, predicted_seconds=10, num_requests=100) == 5
    assert choose_num_shards(5, predicted_seconds=0, num_requests=0) == 0


def test_the_longest_requests_are_dealt_to_different_shards():
    # Cut from both ends alone, the first shard has all eight: equal sums, but it ends with them, alone.
    compute, memory = np.ones(4008), np.full(4008, 0.1)
    compute[-8:], memory[-8:] = 0.5, 100.0
    shards = split_from_both_ends(compute, memory, 4, is_free=np.arange(4008) >= 4000)
    assert [np.count_nonzero(shard >= 4000) for shard in shards] == [2, 2, 2, 2]


def test_every_gpu_gets_as_many_shards() -> None:
    def chosen(seconds: float, gpus: int, stated: int | None = None, num_requests: int = 1000) -> int:
        return choose_num_shards(stated, predicted_seconds=seconds, num_requests=num_requests, gpus=gpus)

    assert [chosen(10, 4), chosen(1800 * 4, 4), chosen(1800 * 4 + 1, 4), chosen(1800 * 5, 2)] == [4, 4, 8, 6]
    assert chosen(10, 4, stated=3) == 3
    assert chosen(10, 4, num_requests=2) == 2


def test_each_shard_gets_its_part_of_a_kind_that_is_estimated_wrongly():
    # 40 requests that share nothing and seem as cheap as any stand at one end; a cut would give them to one shard.
    is_alone = np.ones(4040, np.bool_)
    parts = split_from_both_ends(np.ones(4040), np.full(4040, 2.0), 4, is_alone=is_alone)
    assert [np.count_nonzero(part >= 4000) for part in parts] == [10] * 4
    assert sorted(np.concatenate(parts).tolist()) == list(range(4040))
