"""Greedy tokens equal those of transformers in float32, however the requests are batched, shared or preempted."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.engine.engine_runs import ModelFactory, generate, make_engine, make_prompts, run_engine, stated_requests

PROMPTS = make_prompts(12)
MAX_TOKENS = 14


@pytest.fixture(scope="module")
def expected(llama: Path) -> list[list[int]]:
    return generate(llama, PROMPTS, MAX_TOKENS)


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("chunk_tokens", [5, 16, 512])
@pytest.mark.parametrize("is_two_ended", [True, False])
def test_any_chunk_size(
    llama: Path, expected: list[list[int]], prefix_cache: bool, chunk_tokens: int, is_two_ended: bool
) -> None:
    engine = make_engine(llama, max_num_batched_tokens=chunk_tokens, max_num_seqs=5, prefix_cache=prefix_cache)
    run = run_engine(engine, stated_requests(PROMPTS, MAX_TOKENS), is_two_ended=is_two_ended)
    assert run.token_ids() == expected
    assert all(step.num_prefill_tokens + step.num_decode_tokens <= chunk_tokens for step in run.steps)
    assert (run.total("num_cached_tokens") > 0) == prefix_cache


@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
def test_any_block_size(llama: Path, expected: list[list[int]], block_size: int) -> None:
    engine = make_engine(llama, block_size=block_size, num_blocks=2048 // block_size, max_num_batched_tokens=32)
    run = run_engine(engine, stated_requests(PROMPTS, MAX_TOKENS))
    assert run.token_ids() == expected
    # Two prefixes, of 21 and 42 tokens, for four prompts each: found to the token, whatever the size of the blocks.
    assert run.total("num_cached_tokens") >= 3 * (21 + 42) - 8 * 6


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("chunk_tokens", [5, 64])
@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_a_cache_so_small_that_it_preempts(
    llama: Path, expected: list[list[int]], prefix_cache: bool, chunk_tokens: int, max_in_flight: int
) -> None:
    requests = stated_requests(PROMPTS, MAX_TOKENS, estimated_output_tokens=1)
    engine = make_engine(
        llama,
        max_in_flight=max_in_flight,
        block_size=4,
        num_blocks=25,
        max_num_seqs=8,
        max_num_batched_tokens=chunk_tokens,
        prefix_cache=prefix_cache,
    )
    run = run_engine(engine, requests, is_two_ended=True)
    assert run.token_ids() == expected
    assert run.total("num_preempted") > 0
    assert all(step.num_used_blocks <= 25 for step in run.steps)


def test_tokens_found_again_after_a_preemption_do_not_count_as_cached(llama: Path) -> None:
    prompts = make_prompts(12, num_prefixes=1)
    requests = stated_requests(prompts, MAX_TOKENS, estimated_output_tokens=1)
    run = run_engine(make_engine(llama, block_size=4, num_blocks=24, max_num_seqs=8), requests)
    assert run.total("num_preempted") > 0
    assert run.total("num_cached_tokens") == 0
    assert all(completion.num_cached_tokens == 0 for completion in run.completions.values())


def test_any_order(llama: Path, expected: list[list[int]]) -> None:
    requests = stated_requests(PROMPTS, MAX_TOKENS)
    random.Random(7).shuffle(requests)
    run = run_engine(make_engine(llama, max_num_batched_tokens=24), requests, is_two_ended=True)
    assert run.token_ids() == expected


def test_a_second_source_finds_the_first_ones_prefixes(llama: Path, expected: list[list[int]]) -> None:
    engine = make_engine(llama)
    assert run_engine(engine, stated_requests(PROMPTS, MAX_TOKENS)).token_ids() == expected
    again = run_engine(engine, stated_requests(PROMPTS, MAX_TOKENS))
    assert again.token_ids() == expected
    assert again.total("num_cached_tokens") == sum((len(prompt) - 1) // 8 * 8 for prompt in PROMPTS)


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPES = {
    "one group": ("llama", {}),
    "groups of 3, tied": ("llama", {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "groups of 4, tied": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}}),
    "mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 32}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_any_supported_model(make_model: ModelFactory, shape: str) -> None:
    model_type, overrides = SHAPES[shape]
    folder = make_model(model_type, **overrides)
    prompts = make_prompts(5, seed=1, longest=120)
    engine = make_engine(folder, max_num_batched_tokens=48)
    assert run_engine(engine, stated_requests(prompts, 20)).token_ids() == generate(folder, prompts, 20)
