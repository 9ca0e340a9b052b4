"""Decode attention that reads a prefix shared by several requests once for all of them."""

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
    from blendserve_kernels.triton_kernels.shared_prefix_attention import SharedPrefixPlan


def _check_groups(
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    prefix_lens: torch.Tensor,
    group_starts: torch.Tensor,
    group_sizes: torch.Tensor,
) -> None:
    check_rank("block_table", block_table, "[num_requests, max_blocks]")
    check_inner_contiguous("block_table", block_table, 1)
    check_rank("group_starts", group_starts, "[num_groups]")
    check_shape("context_lens", context_lens, [block_table.shape[0]])
    check_shape("prefix_lens", prefix_lens, [block_table.shape[0]])
    check_shape("group_sizes", group_sizes, group_starts.shape)
    tensors = {
        "block_table": block_table,
        "context_lens": context_lens,
        "prefix_lens": prefix_lens,
        "group_starts": group_starts,
        "group_sizes": group_sizes,
    }
    for name, tensor in tensors.items():
        check_dtype(name, tensor, torch.int32)
    check_same_device("block_table", block_table, **tensors)


def plan_shared_prefix(
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    prefix_lens: torch.Tensor,
    group_starts: torch.Tensor,
    group_sizes: torch.Tensor,
    num_heads: int,
    num_programs: int | None = None,
) -> SharedPrefixPlan | None:
    """Return the plan that every layer of a step can pass to `shared_prefix_decode_attention`; None on the CPU."""
    _check_groups(block_table, context_lens, prefix_lens, group_starts, group_sizes)
    check_same_device("k_cache", k_cache, block_table=block_table)
    if not k_cache.is_cuda:
        return None
    from blendserve_kernels.triton_kernels.shared_prefix_attention import plan_shared_prefix_triton

    return plan_shared_prefix_triton(
        k_cache, block_table, context_lens, prefix_lens, group_starts, group_sizes, num_heads, num_programs
    )


def shared_prefix_decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    prefix_lens: torch.Tensor,
    group_starts: torch.Tensor,
    group_sizes: torch.Tensor,
    scale: float,
    num_programs: int | None = None,
    plan: SharedPrefixPlan | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return what `decode_attention` returns for the same arguments, [B, num_heads, head_dim].

    Group g is the requests group_starts[g] to group_starts[g] + group_sizes[g] - 1 of the batch (int32 [num_groups],
    disjoint; size 0 marks a padding row). They share the first prefix_lens[b] tokens (int32 [B], a multiple of
    block_size, the same for all of a group, less than every context_lens[b]), and the block table of the group's first
    request names their blocks. Requests outside every group have prefix_lens 0. The other arguments are those of
    `decode_attention`; `plan` is what `plan_shared_prefix` returned for this step.
    """
    check_kv_cache(q, k_cache, v_cache)
    check_out(out, q)
    check_shape("block_table", block_table, [q.shape[0], *block_table.shape[1:]])
    _check_groups(block_table, context_lens, prefix_lens, group_starts, group_sizes)
    check_same_device("q", q, k_cache=k_cache, v_cache=v_cache, block_table=block_table)
    if q.is_cuda:
        from blendserve_kernels.triton_kernels.shared_prefix_attention import shared_prefix_decode_attention_triton

        return shared_prefix_decode_attention_triton(
            q,
            k_cache,
            v_cache,
            block_table,
            context_lens,
            prefix_lens,
            group_starts,
            group_sizes,
            scale,
            num_programs,
            plan,
            out,
        )
    return reference.decode_attention(q, k_cache, v_cache, block_table, context_lens, scale, out)
