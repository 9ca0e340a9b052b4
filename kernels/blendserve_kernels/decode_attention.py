"""Attention of one new token per request over the paged cache."""

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
    from blendserve_kernels.triton_kernels.decode_attention import DecodePlan


def _check_table(block_table: torch.Tensor, context_lens: torch.Tensor, num_requests: int) -> None:
    check_rank("block_table", block_table, "[num_requests, max_blocks]")
    check_shape("block_table", block_table, [num_requests, block_table.shape[1]])
    check_shape("context_lens", context_lens, [num_requests])
    check_dtype("block_table", block_table, torch.int32)
    check_dtype("context_lens", context_lens, torch.int32)
    check_inner_contiguous("block_table", block_table, 1)


def plan_decode(
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    num_heads: int,
    num_programs: int | None = None,
) -> DecodePlan | None:
    """Return the plan that every layer of a step can pass to `decode_attention`; None on the CPU, which needs none.

    Arguments as there. A few microseconds on the GPU, no sync; a captured plan is made anew by every replay.
    """
    _check_table(block_table, context_lens, context_lens.shape[0])
    check_same_device("k_cache", k_cache, block_table=block_table, context_lens=context_lens)
    if not k_cache.is_cuda:
        return None
    from blendserve_kernels.triton_kernels.decode_attention import plan_decode_triton

    return plan_decode_triton(k_cache, block_table, context_lens, num_heads, num_programs)


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    num_programs: int | None = None,
    plan: DecodePlan | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the attention output of B single-token queries, [B, num_heads, head_dim].

    q: [B, num_heads, head_dim]. k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim].
    block_table: int32 [B, max_blocks]. context_lens: int32 [B], tokens in the cache including the one being decoded; a
    request of context 0 (a padding row of a captured batch) gives zeros. Cache content beyond a context is never used.
    num_programs: how many SMs of the GPU the kernel may take, all by default; ignored on the CPU.
    plan: what `plan_decode` returned for this step, so that its layers share it; without one each call makes its own.
    out: written and returned if given, contiguous, like q; a view of the rows of a larger buffer will do.
    """
    check_kv_cache(q, k_cache, v_cache)
    check_out(out, q)
    _check_table(block_table, context_lens, q.shape[0])
    check_same_device("q", q, k_cache=k_cache, v_cache=v_cache, block_table=block_table, context_lens=context_lens)
    if q.is_cuda:
        from blendserve_kernels.triton_kernels.decode_attention import decode_attention_triton

        return decode_attention_triton(q, k_cache, v_cache, block_table, context_lens, scale, num_programs, plan, out)
    return reference.decode_attention(q, k_cache, v_cache, block_table, context_lens, scale, out)
