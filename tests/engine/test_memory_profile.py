"""What is profiled is the largest step that can come: of many requests where none is as long as a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from blendserve.engine import engine
from blendserve.engine.memory_profile import largest_batch
from blendserve.models.llama import LlamaModel
from tests.engine.engine_runs import make_engine

BLOCK_SIZE = 8


@pytest.mark.parametrize(
    ("max_model_len", "max_num_seqs", "num_tokens", "chunks"),
    [(64, 16, 200, [64, 64, 64, 8]), (64, 2, 128, [64, 64]), (256, 16, 200, [200])],
)
def test_a_step_is_filled_by_as_many_requests_as_it_takes(
    llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    max_model_len: int,
    max_num_seqs: int,
    num_tokens: int,
    chunks: list[int],
) -> None:
    asked: list[dict[str, Any]] = []

    def profile(model: LlamaModel, **sizes: Any) -> int:
        asked.append(sizes)
        batch = largest_batch(model.device, **sizes)
        shape = (-(-chunks[0] // BLOCK_SIZE), model.config.num_kv_heads, BLOCK_SIZE, model.config.head_dim)
        cache = [(torch.zeros(shape), torch.zeros(shape))] * model.config.num_layers
        assert model.forward(batch, cache).shape == (max_num_seqs, model.config.hidden_size)
        assert batch.prefill is not None
        assert batch.prefill.cu_seqlens_q.diff().tolist() == batch.prefill.context_lens.tolist() == chunks
        return 0

    monkeypatch.setattr(engine, "profile_activation_bytes", profile)
    limits = {"max_model_len": max_model_len, "max_num_seqs": max_num_seqs, "max_num_batched_tokens": 200}
    make_engine(llama, num_blocks=None, block_size=BLOCK_SIZE, **limits)
    assert [sizes["num_tokens"] for sizes in asked] == [num_tokens]
