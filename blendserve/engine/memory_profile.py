"""How much memory one step of the largest size needs besides weights and KV cache, found by running one on the GPU."""

from __future__ import annotations

import torch

from blendserve.models.batch import ModelBatch, PrefillPart
from blendserve.models.llama import LlamaModel


@torch.inference_mode()
def profile_activation_bytes(
    model: LlamaModel, *, num_tokens: int, num_sampled: int, max_model_len: int, block_size: int
) -> int:
    """Peak bytes of a prefill of `num_tokens` tokens that samples `num_sampled` of them. 0 on a CPU, which pages."""
    if model.device.type != "cuda":
        return 0
    config, device = model.config, model.device
    num_blocks = -(-min(num_tokens, max_model_len) // block_size)
    shape = (num_blocks, config.num_kv_heads, block_size, config.head_dim)
    # One layer's cache serves all layers, one request's all requests: its content doesn't matter.
    cache = (torch.zeros(shape, dtype=model.dtype, device=device), torch.zeros(shape, dtype=model.dtype, device=device))
    batch = largest_batch(
        device, num_tokens=num_tokens, num_sampled=num_sampled, max_model_len=max_model_len, block_size=block_size
    )
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    model.logits(model.forward(batch, [cache] * config.num_layers))
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del cache, batch
    torch.cuda.empty_cache()
    return peak


def largest_batch(
    device: torch.device, *, num_tokens: int, num_sampled: int, max_model_len: int, block_size: int
) -> ModelBatch:
    """Prompts of `max_model_len` tokens, the last one cut to `num_tokens` in all. They share their blocks."""
    positions = torch.arange(num_tokens, device=device) % max_model_len
    bounds = torch.tensor([*range(0, num_tokens, max_model_len), num_tokens], dtype=torch.int32, device=device)
    longest = min(num_tokens, max_model_len)
    blocks = torch.arange(-(-longest // block_size), dtype=torch.int32, device=device)
    return ModelBatch(
        token_ids=torch.zeros_like(positions),
        positions=positions,
        slot_mapping=positions,
        decode=None,
        prefill=PrefillPart(
            block_table=blocks.repeat(len(bounds) - 1, 1),
            cu_seqlens_q=bounds,
            context_lens=bounds.diff(),
            max_seqlen_q=longest,
        ),
        outputs=torch.arange(num_tokens - num_sampled, num_tokens, device=device),
    )
