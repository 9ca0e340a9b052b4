"""Requests whose keys and values lie scattered over a paged cache that holds NaN everywhere else."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# What block tables hold behind a request's last block: reading there is an error that must show.
_NO_BLOCK = 2**30

# Triton's interpreter multiplies the bits of bfloat16 matrices, so that dtype is checked where kernels are compiled.
HALF_DTYPES = [torch.float16, torch.bfloat16] if torch.cuda.is_available() else [torch.float16]

# Largest absolute error of attention over values of about one, beside the twin in float32.
ATTENTION_TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class PagedRequests:
    """B requests in a cache; `keys` and `values` are the same tokens, dense, [context_len, num_kv_heads, D] each."""

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_table: torch.Tensor
    context_lens: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]


def make_paged_requests(
    context_lens: list[int],
    *,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    num_shared_tokens: int = 0,
) -> PagedRequests:
    """Scatter random keys and values; all requests share the blocks of the first num_shared_tokens."""
    num_shared_blocks = num_shared_tokens // block_size
    num_blocks = [-(-length // block_size) for length in context_lens]
    shuffled = torch.randperm(sum(num_blocks) + num_shared_blocks + 3).tolist()
    shared_blocks, free = shuffled[:num_shared_blocks], iter(shuffled[num_shared_blocks:])
    cache_shape = (len(shuffled), num_kv_heads, block_size, head_dim)
    k_cache, v_cache = torch.full(cache_shape, torch.nan), torch.full(cache_shape, torch.nan)
    block_table = torch.full((len(context_lens), max(num_blocks) + 2), _NO_BLOCK, dtype=torch.int32)
    shared_kv = torch.randn(2, num_shared_tokens, num_kv_heads, head_dim)
    keys, values = [], []
    for request, length in enumerate(context_lens):
        kv = torch.randn(2, length, num_kv_heads, head_dim)
        blocks = [next(free) for _ in range(num_blocks[request])]
        if length >= num_shared_tokens:
            kv[:, :num_shared_tokens] = shared_kv
            blocks[:num_shared_blocks] = shared_blocks
        kv = kv.to(dtype).float()
        tokens = torch.arange(length)
        token_blocks = torch.tensor(blocks, dtype=torch.int64)[tokens // block_size]
        k_cache[token_blocks, :, tokens % block_size] = kv[0]
        v_cache[token_blocks, :, tokens % block_size] = kv[1]
        block_table[request, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        keys.append(kv[0])
        values.append(kv[1])
    return PagedRequests(
        k_cache.to(dtype).to(device),
        v_cache.to(dtype).to(device),
        block_table.to(device),
        torch.tensor(context_lens, dtype=torch.int32, device=device),
        keys,
        values,
    )


def plain_attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention spelled out in float64: q [L, num_heads, D] are the last L of the S positions."""
    num_queries, num_keys = q.shape[0], keys.shape[0]
    group_size = q.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(group_size, dim=1) for x in (keys, values))
    scores = torch.einsum("lhd,shd->hls", q.double(), keys) * scale
    is_hidden = torch.ones(num_queries, num_keys, dtype=torch.bool).triu(num_keys - num_queries + 1)
    return torch.einsum("hls,shd->lhd", scores.masked_fill(is_hidden, -torch.inf).softmax(dim=-1), values)
