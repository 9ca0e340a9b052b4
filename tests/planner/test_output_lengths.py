"""Output lengths: hint before sample before max_tokens, nearest ancestor, censored samples, bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blendserve.planner.output_lengths import SOURCES, estimate_output_lengths
from blendserve.planner.prefix_tree import build_prefix_tree

NAN = float("nan")


def estimate(shared, *, limits, hints=None, observed=None, cut_off=(), ignore_eos=False, prompts=100):
    count = len(shared)
    is_cut_off = np.zeros(count, np.bool_)
    is_cut_off[list(cut_off)] = True
    return estimate_output_lengths(
        build_prefix_tree(np.array(shared, dtype=np.int64)),
        num_prompt_tokens=np.array(prompts if isinstance(prompts, list) else [prompts] * count),
        max_tokens=np.array(limits if isinstance(limits, list) else [limits] * count),
        hints=np.array(hints or [NAN] * count),
        observed=np.array(observed or [NAN] * count),
        is_cut_off=is_cut_off,
        ignore_eos=ignore_eos,
    )


LENGTH = st.one_of(st.just(NAN), st.floats(0, 1e9))


@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 1000), LENGTH, LENGTH, st.booleans()), max_size=30),
    ignore_eos=st.booleans(),
)
def test_estimates_lie_between_one_and_the_limit(rows, ignore_eos):
    lengths = estimate(
        [row[0] for row in rows],
        limits=[row[1] for row in rows],
        hints=[row[2] for row in rows],
        observed=[min(row[3], row[1]) for row in rows],
        cut_off=[place for place, row in enumerate(rows) if row[4]],
        ignore_eos=ignore_eos,
    )
    limits = np.array([row[1] for row in rows], dtype=np.float64)
    assert np.all((lengths.mean >= 1) & (lengths.mean <= limits))
    assert np.all((lengths.estimated_tokens >= 1) & (lengths.estimated_tokens <= limits))
    assert np.all(lengths.mean_square >= lengths.mean**2 * (1 - 1e-9))
    assert np.all(lengths.mean_square <= lengths.mean * limits * (1 + 1e-9))


def test_a_hint_goes_before_a_sample_before_the_limit():
    known = estimate([0, 0], limits=50, hints=[7.0, NAN], observed=[NAN, 20.0])
    assert SOURCES[known.source].tolist() == ["hint", "sample"]
    assert known.estimated_tokens.tolist() == [7, 20]
    unknown = estimate([0, 0], limits=50, hints=[70.0, NAN])
    assert SOURCES[unknown.source].tolist() == ["hint", "max_tokens"]
    assert unknown.estimated_tokens.tolist() == [50, 50]
    assert estimate([0, 0], limits=50, hints=[7.0, NAN], ignore_eos=True).estimated_tokens.tolist() == [50, 50]


def test_an_unsampled_subtree_takes_its_nearest_ancestor_with_enough_samples():
    # Two subtrees below the root; inside the second, one branch is sampled and its sibling isn't.
    shared = [0, 5, 5, 5, 5, 5, 0, 5, 9, 9, 9, 9, 5, 9]
    observed = [10.0] * 5 + [NAN] + [NAN, 100.0, 100.0, 100.0, 100.0, 100.0, NAN, NAN]
    lengths = estimate(shared, limits=1000, observed=observed)
    assert lengths.estimated_tokens[5] == 10
    assert lengths.estimated_tokens[[6, 12, 13]].tolist() == [100, 100, 100]
    alone = estimate([0] * 6, limits=1000, observed=[10.0, 20.0, 30.0, 40.0, NAN, NAN])
    assert alone.estimated_tokens[4:].tolist() == [25, 25]  # no ancestor but the root: the whole job


def test_moments_of_a_mixed_subtree():
    lengths = estimate([0] * 5, limits=5000, observed=[1.0, 1.0, 1999.0, 1999.0, NAN])
    assert lengths.mean[4] == 1000
    assert lengths.mean_square[4] == pytest.approx((1 + 1999**2) / 2)


def test_a_sample_that_was_cut_off_is_longer_than_it_looks():
    limits = [100, 100, 100, 100, 1000]
    finished = estimate([0] * 5, limits=limits, observed=[20.0, 100.0, 100.0, 100.0, NAN])
    cut_off = estimate([0] * 5, limits=limits, observed=[20.0, 100.0, 100.0, 100.0, NAN], cut_off=[1, 2, 3])
    assert finished.estimated_tokens[4] == 80
    assert cut_off.estimated_tokens[4] == 80 + 0.75 * 320  # three of them go on for 320 / 1 tokens


def test_a_cut_off_sample_is_a_length_where_nobody_may_go_on():
    lengths = estimate([0] * 5, limits=100, observed=[20.0, 100.0, 100.0, 100.0, NAN], cut_off=[1, 2, 3])
    assert lengths.estimated_tokens[4] == 80


def test_prompts_that_share_nothing_are_told_apart_by_their_length():
    # Without a prefix in common all stand below the root; a mean of both kinds would be right for none.
    prompts = [20, 22, 25, 30, 28, 2000, 1100, 1900, 1990, 2047]
    observed = [4000.0, 5000.0, 3000.0, 4000.0, NAN, 10.0, 11.0, 9.0, 10.0, NAN]
    lengths = estimate([0] * 10, limits=10_000, observed=observed, prompts=prompts)
    assert lengths.estimated_tokens[[4, 9]].tolist() == [4000, 10]
