"""In bfloat16 tokens may differ from float32's, but only between logits as close as bfloat16 itself leaves them.

Heads of 64 and 128 and blocks of 128 tokens are what a GPU has its fastest kernels for, if the tests run there.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.engine_runs import ModelFactory, make_engine, make_prompts, run_engine, stated_requests

PROMPTS = make_prompts(10, seed=3, num_prefixes=4, longest=150)
SHAPE = {"hidden_size": 336, "intermediate_size": 512, "max_position_embeddings": 512, "initializer_range": 0.05}


def logits_of(folder: Path, token_ids: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Logits [num_tokens, vocab_size] of transformers for a whole sequence."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0].float()
    return logits


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(8, 2, 64), (4, 1, 128), (7, 1, 64), (6, 2, 128)])
def test_chosen_tokens_are_the_best_within_the_rounding(
    make_model: ModelFactory, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    heads = {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads, "head_dim": head_dim}
    folder = make_model("llama", **SHAPE, **heads)
    engine = make_engine(folder, dtype="bfloat16", block_size=128, num_blocks=64, max_num_batched_tokens=200)
    run = run_engine(engine, stated_requests(PROMPTS, 12))
    assert run.total("num_cached_tokens") > 0
    for prompt, completion in zip(PROMPTS, run.token_ids(), strict=True):
        sequence = [*prompt, *completion]
        exact = logits_of(folder, sequence, torch.float32)
        rounded = logits_of(folder, sequence, torch.bfloat16)
        tolerance = 3 * float((exact - rounded).abs().max())
        assert tolerance < 0.25 * float(exact.max(dim=-1).values.mean() - exact.mean()), "the test tells nothing apart"
        for index, token in enumerate(completion, start=len(prompt) - 1):
            assert float(exact[index].max() - exact[index, token]) <= tolerance
