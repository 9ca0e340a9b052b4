"""The dual scan: every request once, from both ends, in the proportion that keeps compute and memory balanced."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blendserve.dual_scanner import DualScanner, Front

SECONDS = st.floats(min_value=0.0, max_value=1e6, allow_nan=False)


def make_scanner(compute: list[float], memory: list[float], is_two_ended: bool = True) -> DualScanner:
    compute_seconds = np.array(compute, dtype=np.float64)
    memory_seconds = np.array(memory, dtype=np.float64)
    return DualScanner(
        compute_seconds=compute_seconds,
        memory_seconds=memory_seconds,
        unit_density=compute_seconds / np.maximum(memory_seconds, 1e-9),
        is_two_ended=is_two_ended,
    )


@settings(deadline=None)
@given(
    costs=st.lists(st.tuples(SECONDS, SECONDS), max_size=40),
    held=st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)),
    is_two_ended=st.booleans(),
)
def test_each_position_once_left_ascending_right_descending(costs, held, is_two_ended):
    costs = sorted(costs, key=lambda cost: -cost[0] / max(cost[1], 1e-9))
    scanner = make_scanner([cost[0] for cost in costs], [cost[1] for cost in costs], is_two_ended)
    taken: dict[Front, list[int]] = {Front.LEFT: [], Front.RIGHT: []}
    while (front := scanner.next_front(held[0] * len(taken[Front.LEFT]), held[1], 1e6)) is not None:
        assert 0.0 <= scanner.left_share <= 1.0
        position = scanner.peek(front)
        assert scanner.take(front) == position
        taken[front].append(position)
    assert scanner.num_remaining == 0
    assert taken[Front.LEFT] == sorted(taken[Front.LEFT])
    assert taken[Front.RIGHT] == sorted(taken[Front.RIGHT], reverse=True)
    assert sorted(taken[Front.LEFT] + taken[Front.RIGHT]) == list(range(len(costs)))
    if not is_two_ended:
        assert taken[Front.RIGHT] == []


def test_share_solves_the_two_partition_equations():
    # The paper's example: 3.73 * 19.3 GB + 0.096 * 40.7 GB = 1.27 * 60 GB.
    middle_compute = 1.27 * 1000.0 - 3.73 - 0.096
    scanner = make_scanner([3.73, middle_compute, 0.096], [1.0, 998.0, 1.0])
    assert scanner.left_share * 60 == pytest.approx(19.38, abs=0.05)
    assert scanner.next_front(left_tokens=19.0, right_tokens=41.0, capacity_tokens=60) is Front.LEFT
    assert scanner.next_front(left_tokens=20.0, right_tokens=40.0, capacity_tokens=60) is Front.RIGHT


@pytest.mark.parametrize(
    ("unit_density", "share"),
    [([5.0, 4.0, 3.0], 0.0), ([0.9, 0.8, 0.7], 1.0)],
    ids=["both ends denser than the root", "both ends less dense than the root"],
)
def test_both_ends_on_one_side_of_the_root_are_clamped(unit_density, share):
    # The root is at 1.0. Read literally, the equations give -1.0 and 1.5: negative memory for one front.
    scanner = DualScanner(
        compute_seconds=np.array([1.0, 1.0, 1.0]),
        memory_seconds=np.ones(3),
        unit_density=np.array(unit_density),
        is_two_ended=True,
    )
    assert scanner.left_share == share


def test_equally_dense_ends_need_one_front_only():
    scanner = make_scanner([2.0, 2.0, 2.0], [1.0, 1.0, 1.0])
    assert scanner.left_share == 1.0
    assert scanner.next_front(0.0, 0.0, 100.0) is Front.LEFT


def test_root_density_is_that_of_what_remains():
    scanner = make_scanner([8.0, 2.0, 0.0], [1.0, 1.0, 1.0])
    assert scanner.left_share == pytest.approx((10 / 3 - 0.0) / (8.0 - 0.0))
    scanner.take(Front.LEFT)
    assert scanner.left_share == pytest.approx((2 / 2 - 0.0) / (2.0 - 0.0))


def test_no_memory_time_at_all_is_no_division_by_zero():
    scanner = make_scanner([2.0, 1.0], [0.0, 0.0])
    assert 0.0 <= scanner.left_share <= 1.0


def test_an_empty_shard_has_no_next_front():
    scanner = make_scanner([], [])
    assert scanner.next_front(0.0, 0.0, 100.0) is None
    with pytest.raises(IndexError, match="Nothing remains"):
        scanner.take(Front.LEFT)


def test_invalid_costs_are_refused():
    with pytest.raises(ValueError, match="finite"):
        make_scanner([float("nan")], [1.0])
    with pytest.raises(ValueError, match="shape"):
        DualScanner(
            compute_seconds=np.ones(2),
            memory_seconds=np.ones(3),
            unit_density=np.ones(2),
            is_two_ended=True,
        )


def test_the_right_front_leaves_room_to_prefill():
    scanner = make_scanner([1000.0, 1.0, 1.0], [0.0, 500.0, 900.0])
    assert scanner.left_share < 0.01
    assert scanner.max_held_tokens(Front.RIGHT, 1000.0) == pytest.approx(800.0)
    assert scanner.max_held_tokens(Front.LEFT, 1000.0) == 1000.0
    assert scanner.density_remaining == pytest.approx(1002 / 1400)
