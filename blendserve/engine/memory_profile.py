"""How much memory one step of the largest size needs besides weights and KV cache, found by running one on the GPU."""

from __future__ import annotations

import torch

from blendserve.models.batch import ModelBatch, PrefillPart
from blendserve.models.llama import LlamaModel


@torch.inference_mode()
def profile_activation_bytes(model: LlamaModel, *, num_tokens: int, num_sampled: int, block_size: int) -> int:
    """Peak bytes of a prefill of `num_tokens` tokens that samples `num_sampled` of them. 0 on a CPU, which pages."""
    if model.device.type != "cuda":
        return 0
    config, device = model.config, model.device
    num_blocks = -(-num_tokens // block_size)
    shape = (num_blocks, config.num_kv_heads, block_size, config.head_dim)
    # One layer's cache serves all layers: its content doesn't matter.
    cache = (torch.zeros(shape, dtype=model.dtype, device=device), torch.zeros(shape, dtype=model.dtype, device=device))
    tokens = torch.arange(num_tokens, device=device)
    batch = ModelBatch(
        token_ids=torch.zeros_like(tokens),
        positions=tokens,
        slot_mapping=tokens,
        decode=None,
        prefill=PrefillPart(
            block_table=torch.arange(num_blocks, dtype=torch.int32, device=device)[None],
            cu_seqlens_q=torch.tensor([0, num_tokens], dtype=torch.int32, device=device),
            context_lens=torch.tensor([num_tokens], dtype=torch.int32, device=device),
            max_seqlen_q=num_tokens,
        ),
        outputs=tokens[-num_sampled:],
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
