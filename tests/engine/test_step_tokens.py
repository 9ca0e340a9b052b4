"""How many tokens of prompts a step has beside its decodes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blendserve.step_tokens import FEW_DECODES, PADDING, STEP_TOKENS, padded_tokens, prefill_tokens


@given(st.integers(0, 2000), st.integers(1, 10_000))
def test_a_step_has_room_for_prompts_and_none_beyond_its_limit(num_decodes: int, limit: int) -> None:
    tokens = prefill_tokens(num_decodes, limit)
    assert tokens >= 0
    assert num_decodes + tokens <= max(limit, num_decodes)
    assert tokens > 0 or padded_tokens(num_decodes + 1) > limit or num_decodes >= limit


@pytest.mark.parametrize(
    ("num_decodes", "limit", "step_tokens"),
    [
        (0, 8192, 8192),
        (FEW_DECODES - 1, 8192, 8192),  # too few to go on beside small steps
        (FEW_DECODES, 8192, STEP_TOKENS),
        (STEP_TOKENS - 1, 8192, STEP_TOKENS),
        (STEP_TOKENS, 8192, STEP_TOKENS + PADDING),  # never none at all
        (400, 512, 512),
    ],
)
def test_a_step_of_many_decodes_is_as_long_as_is_best(num_decodes: int, limit: int, step_tokens: int) -> None:
    assert num_decodes + prefill_tokens(num_decodes, limit) == step_tokens


def test_padding_is_the_least_that_makes_whole_rows() -> None:
    sizes = np.arange(1, 1000)
    padded = np.array([padded_tokens(int(size)) for size in sizes])
    assert (padded % PADDING == 0).all() and (padded >= sizes).all() and (padded - sizes < PADDING).all()
