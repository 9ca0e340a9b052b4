"""Decodes and prefill chunks side by side give the same tokens as together."""

from __future__ import annotations

from pathlib import Path

import pytest

from blendserve.engine.overlap import OverlapPolicy
from tests.engine.engine_runs import generate, make_engine, make_prompts, run_engine, stated_requests

PROMPTS = make_prompts(16, seed=2)


@pytest.mark.parametrize("chunk_tokens", [12, 64])
def test_tokens_are_the_same(llama: Path, chunk_tokens: int) -> None:
    policy = OverlapPolicy(decode_programs=40, min_kv_tokens=1, min_prefill_tokens=2)
    engine = make_engine(llama, None, None, policy, max_num_batched_tokens=chunk_tokens, max_num_seqs=5)
    run = run_engine(engine, stated_requests(PROMPTS, 12), is_two_ended=True)
    assert run.token_ids() == generate(llama, PROMPTS, 12)
    assert any(step.num_decode_tokens and step.num_prefill_tokens > 2 for step in run.steps)


@pytest.mark.parametrize(
    ("num_decodes", "num_kv_tokens", "num_prefill_tokens", "expected"),
    [(0, 0, 500, 0), (50, 99, 500, 0), (50, 100, 99, 0), (50, 100, 100, 36), (50, 100, 801, 0)],
)
def test_a_step_runs_in_one_piece_unless_there_is_enough_of_both(
    num_decodes: int, num_kv_tokens: int, num_prefill_tokens: int, expected: int
) -> None:
    policy = OverlapPolicy(min_kv_tokens=100, min_prefill_tokens=100, max_prefill_tokens=800)
    assert policy.num_programs(num_decodes, num_kv_tokens, num_prefill_tokens) == expected
