"""Causal attention of prompt chunks over the paged cache, which already holds the chunk and everything before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from blendserve_kernels import reference
from blendserve_kernels.argument_checks import (
    check_dtype,
    check_inner_contiguous,
    check_kv_cache,
    check_out,
    check_rank,
    check_same_device,
    check_shape,
)

if TYPE_CHECKING:
    from blendserve_kernels.triton_kernels.prefill_attention import PrefillPlan


def _check_chunks(cu_seqlens_q: torch.Tensor, context_lens: torch.Tensor, num_requests: int) -> None:
    check_shape("cu_seqlens_q", cu_seqlens_q, [num_requests + 1])
    check_shape("context_lens", context_lens, [num_requests])
    check_dtype("cu_seqlens_q", cu_seqlens_q, torch.int32)
    check_dtype("context_lens", context_lens, torch.int32)


def plan_prefill(
    k_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    num_tokens: int,
    num_heads: int,
) -> PrefillPlan | None:
    """Return the plan that every layer of a step can pass to `prefill_attention`; None on the CPU, which needs none.

    num_tokens: rows of the q that will be passed. Other arguments as there. A few microseconds on the GPU, no sync.
    """
    _check_chunks(cu_seqlens_q, context_lens, context_lens.shape[0])
    check_same_device("k_cache", k_cache, cu_seqlens_q=cu_seqlens_q, context_lens=context_lens)
    if not k_cache.is_cuda or context_lens.shape[0] == 0 or num_tokens == 0:
        return None
    from blendserve_kernels.triton_kernels.prefill_attention import plan_prefill_triton

    return plan_prefill_triton(k_cache, cu_seqlens_q, context_lens, num_tokens, num_heads)


def prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    max_seqlen_q: int,
    plan: PrefillPlan | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the attention output of B ragged chunks among T query tokens, [T, num_heads, head_dim].

    q: [T, num_heads, head_dim]; the chunk of request b is q[cu_seqlens_q[b] : cu_seqlens_q[b + 1]].
    k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim]. block_table: int32 [B, max_blocks].
    cu_seqlens_q: int32 [B + 1], from 0 or more to T or less; rows of q before the first chunk and behind the last one
    are neither read nor written. A chunk may be empty, its context too: so padding is marked, behind the real chunks.
    context_lens: int32 [B], tokens of the request in the cache including this chunk, so
    query i of request b sits at position context_lens[b] - chunk_length + i and sees the keys up to its own.
    max_seqlen_q: an upper bound of the longest chunk, on the host, that the tiles are chosen by. With the same bound a
    row is bitwise the same whatever else is in the batch.
    plan: what `plan_prefill` returned for this step, so that its layers share it; without one each call makes its own.
    out: written and returned if given, contiguous, like q. Without it the rows outside every chunk are undefined.
    Cache content beyond a context is never used.
    """
    check_kv_cache(q, k_cache, v_cache)
    check_out(out, q)
    check_rank("block_table", block_table, "[num_requests, max_blocks]")
    num_requests = block_table.shape[0]
    _check_chunks(cu_seqlens_q, context_lens, num_requests)
    check_dtype("block_table", block_table, torch.int32)
    check_inner_contiguous("block_table", block_table, 1)
    check_same_device(
        "q",
        q,
        k_cache=k_cache,
        v_cache=v_cache,
        block_table=block_table,
        cu_seqlens_q=cu_seqlens_q,
        context_lens=context_lens,
    )
    if q.is_cuda:
        from blendserve_kernels.triton_kernels.prefill_attention import prefill_attention_triton

        return prefill_attention_triton(
            q, k_cache, v_cache, block_table, cu_seqlens_q, context_lens, scale, max_seqlen_q, plan=plan, out=out
        )
    return reference.prefill_attention(q, k_cache, v_cache, block_table, cu_seqlens_q, context_lens, scale, out)
