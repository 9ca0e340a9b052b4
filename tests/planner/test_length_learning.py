"""Lengths that are learnt while a shard runs: estimates by class, the order that follows, and whom to give up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blendserve.dual_scanner import DualScanner, Front
from blendserve.length_learning import LengthLearner, ObservedLengths, ShardLengths, surplus
from blendserve.planner.length_classes import length_classes
from blendserve.planner.prefix_tree import build_prefix_tree
from blendserve.planner.stratified_sample import draw_stratified

KV, DECODE = 1e-5, 1e-3


def learner_of(classes, estimated, *, unit_id=None, observed=(), max_tokens=1000):
    """A learner of a shard with prompts of 10 tokens; `observed`: (classes, tokens, is_cut_off) of earlier requests."""
    classes, estimated = np.array(classes, np.int32), np.array(estimated, np.int64)
    count = len(estimated)
    seen = ObservedLengths(
        np.array([row[0] for row in observed], np.int32).reshape(-1, classes.shape[1]),
        np.array([row[1] for row in observed], np.int64),
        np.array([row[2] for row in observed], np.bool_),
    )
    compute = 10 * DECODE + estimated * DECODE
    memory = (10 * estimated + estimated**2 / 2) * KV
    shard = ShardLengths(
        classes=classes,
        estimated_tokens=estimated,
        max_tokens=np.full(count, max_tokens),
        kv_prompt_tokens=np.full(count, 10),
        unit_id=np.arange(count) if unit_id is None else np.array(unit_id),
        compute_seconds=compute,
        memory_seconds=memory,
        seconds_per_prompt_token=DECODE,
        seconds_per_decode_token=DECODE,
        seconds_per_kv_token=KV,
        observed=seen,
    )
    scanner = DualScanner(
        compute_seconds=compute, memory_seconds=memory, unit_density=compute / memory, is_two_ended=True
    )
    return LengthLearner(shard, scanner), scanner


NOBODY = np.zeros(0, np.int64)


def test_what_turns_out_long_moves_to_the_memory_heavy_front():
    # Both kinds are planned at 50 tokens; four of the second kind are done after 400.
    learner, scanner = learner_of([[0, 9]] * 6 + [[1, 9]] * 6, [50] * 12)
    for position in range(6, 10):
        learner.finish(position, 400, is_cut_off=False)
    for position in range(4):
        learner.finish(position, 5, is_cut_off=False)
    learner.revise(NOBODY, NOBODY)
    assert learner.estimated_tokens.tolist() == [5] * 6 + [400] * 6
    assert scanner.peek(Front.LEFT) < 6 <= scanner.peek(Front.RIGHT)
    assert scanner.ahead(Front.RIGHT, 6) == [11, 10, 9, 8, 7, 6]
    compute, memory = scanner.seconds_at(11)
    assert compute == pytest.approx(410 * DECODE)
    assert memory == pytest.approx((399 * 10 + 400 * 399 / 2) * KV)


def test_running_requests_count_as_longer_than_they_are():
    learner, _ = learner_of([[0]] * 6, [10] * 6)
    learner.finish(0, 20, is_cut_off=False)
    expected = learner.revise(np.array([1, 2, 3]), np.array([100, 100, 100]))
    # One end in 320 tokens: each goes on for as many, the cap of eight times what has been seen aside.
    assert expected.tolist() == [420, 420, 420]
    assert learner.estimated_tokens[5] == (320 + 3 * 320) / 4


def test_what_is_known_of_a_finer_class_says_nothing_of_the_others():
    # Four long ones of class 0 and four short ones of other classes, all in the one coarse class.
    seen = [([0, 9], 500, False)] * 4 + [([place, 9], 8, False) for place in range(2, 6)]
    learner, _ = learner_of([[0, 9], [1, 9]], [50, 50], observed=seen)
    learner.revise(NOBODY, NOBODY)
    assert learner.estimated_tokens.tolist() == [500, 8]


def test_known_lengths_and_unobserved_classes_stay_as_planned():
    learner, scanner = learner_of([[-1, -1], [0, 1]], [77, 33], observed=[([2, 2], 5, False)] * 4)
    before = [scanner.seconds_at(position) for position in range(2)]
    assert learner.revise(np.array([0]), np.array([3])).tolist() == [77]
    assert learner.estimated_tokens.tolist() == [77, 33]
    assert scanner.seconds_at(0) == before[0]


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=20),
    units=st.integers(1, 4),
    fronts=st.lists(st.sampled_from(list(Front)), min_size=20, max_size=20),
)
def test_every_request_is_taken_once_however_often_the_order_changes(lengths, units, fronts):
    count = len(lengths)
    unit_id = np.arange(count) // units
    learner, scanner = learner_of([[place % 3, 9] for place in range(count)], [50] * count, unit_id=unit_id)
    taken = []
    for front in fronts[:count]:
        position = scanner.take(front)
        taken.append(position)
        learner.finish(position, lengths[position], is_cut_off=False)
        learner.revise(NOBODY, NOBODY)
        waiting = unit_id[scanner.remaining]
        assert np.count_nonzero(np.diff(waiting)) == len(set(waiting.tolist())) - bool(len(waiting)), "a unit was cut"
    assert sorted(taken) == list(range(count))


def test_revisions_become_rare():
    learner, _ = learner_of([[0]], [1])
    due = [step for step in range(100_000) if learner.is_due(step)]
    assert due[0] == 64
    assert len(due) < 80


@settings(deadline=None)
@given(rows=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), max_size=8), capacity=st.integers(1, 200))
def test_as_few_are_given_up_as_it_takes_and_the_cheapest(rows, capacity):
    held, rest = (np.array([row[side] for row in rows], np.int64) for side in (0, 1))
    given_up = surplus(held, rest, capacity).tolist()

    def peak(kept):
        steps = range(1, int(rest.max(initial=0)) + 1)
        return max((sum(held[i] + step for i in kept if step <= rest[i]) for step in steps), default=0)

    order = np.argsort(held, kind="stable").tolist()
    assert given_up == order[: len(given_up)]
    kept = order[len(given_up) :]
    assert peak(kept) <= capacity or len(kept) <= 1
    if given_up:
        assert peak(order[len(given_up) - 1 :]) > capacity


def test_classes_go_from_prompts_just_as_long_to_the_whole_job():
    shared = np.array([0, 9, 9, 9, 0, 0, 0])
    prompts = np.array([40, 40, 41, 300, 40, 40, 41])
    classes = length_classes(build_prefix_tree(shared), prompts)
    alike = [[tuple(np.flatnonzero(level == level[row])) for level in classes.T] for row in (0, 5)]
    assert alike[0][:3] == [(0, 1), (0, 1, 2), (0, 1, 2, 3)]  # in its subtree: as long, about as long, all
    assert alike[0][-3:] == [(0, 1, 4, 5), (0, 1, 2, 4, 5, 6), tuple(range(7))]
    assert alike[1][0] == (4, 5)


def test_a_length_that_stands_out_has_a_stratum_of_its_own():
    # Lengths from 32 to 63 are about alike; 300 of 2,300 are 40 tokens long and of another kind.
    prompts = np.concatenate([np.full(300, 40), 32 + np.arange(2000) % 32])
    sampled = draw_stratified(np.zeros(2300, np.int64), prompts, np.arange(2300), 20)
    assert np.count_nonzero(prompts[sampled] == 40) >= 3
