"""With `deterministic` a request's tokens are bitwise the same, in bfloat16 too, whatever runs beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from blendserve.engine import engine
from blendserve.engine_limits import EngineLimits
from blendserve.models.batch import ModelBatch
from blendserve.models.llama import LayerCache, LlamaModel
from tests.engine.engine_runs import ModelFactory, generate, make_engine, make_prompts, run_engine, stated_requests

PROMPTS = make_prompts(12, seed=5, num_prefixes=3, longest=60)
SHAPE = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}


@pytest.fixture(scope="module")
def folder(make_model: ModelFactory) -> Path:
    # Small weights leave the logits close to each other, so that any other rounding would choose other tokens.
    return make_model("llama", **SHAPE, intermediate_size=256, initializer_range=0.02)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_seqs": 1},
        {"max_num_batched_tokens": 40},
        {"prefix_cache": False},
        {"num_blocks": 6, "max_num_seqs": 3},
        {"max_in_flight": 1},
    ],
    ids=str,
)
def test_tokens_do_not_depend_on_the_batch(folder: Path, settings: dict[str, Any]) -> None:
    requests = stated_requests(PROMPTS, 12)
    common: dict[str, Any] = {"dtype": "bfloat16", "deterministic": True, "block_size": 128, "num_blocks": 64}
    together = run_engine(make_engine(folder, **common), requests).token_ids()
    otherwise = run_engine(make_engine(folder, **{**common, **settings}), requests[::-1]).token_ids()
    assert together == otherwise
    assert len({tuple(tokens) for tokens in together}) > 3


def test_decodes_as_chunks_and_padding_change_no_token(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does in a deterministic run, done on any device."""
    limits = EngineLimits(8, 5, 48, is_batch_invariant=True)
    monkeypatch.setattr(engine, "resolve_limits", lambda _spec, is_gpu: limits)
    forward, longest = LlamaModel.forward, set()

    def see(model: LlamaModel, batch: ModelBatch, kv_cache: list[LayerCache]) -> torch.Tensor:
        assert batch.decode is None and batch.prefill is not None
        longest.add(batch.prefill.max_seqlen_q)
        return forward(model, batch, kv_cache)

    monkeypatch.setattr(LlamaModel, "forward", see)
    run = run_engine(make_engine(llama), stated_requests(PROMPTS, 12))
    assert run.token_ids() == generate(llama, PROMPTS, 12)
    assert len(longest) == 1, "attention chooses its tiles by it"
