"""Launches shared-prefix decode attention: the prefix part for a whole group at once, then each request's suffix."""

from __future__ import annotations

import torch

from blendserve_kernels.triton_kernels.decode_attention import (
    PREFIX,
    SUFFIX,
    LaunchShape,
    choose_launch_shape,
    launch_paged_attention,
    rows_of_group,
)

_PREFIX_ROWS = 64  # query rows of a prefix tile: one warp group's matrix instruction


def shared_prefix_decode_attention_triton(
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
    prefix_rows: int = _PREFIX_ROWS,
    prefix_shape: LaunchShape | None = None,
    suffix_shape: LaunchShape | None = None,
) -> torch.Tensor:
    """Launch `shared_prefix_attention.shared_prefix_decode_attention`; arguments as there, unchecked. No host sync."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    num_kv_heads = k_cache.shape[1]
    rows = rows_of_group(q.shape[1], num_kv_heads)
    prefix_rows = max(prefix_rows, rows)
    prefix_out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    prefix_lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if group_starts.shape[0]:
        launch_paged_attention(
            q,
            k_cache,
            v_cache,
            block_table,
            context_lens,
            scale,
            part=PREFIX,
            out=prefix_out,
            shape=prefix_shape or choose_launch_shape(k_cache, prefix_rows, num_programs, is_prefix=True),
            rows=prefix_rows,
            prefix_lens=prefix_lens,
            groups=(group_starts, group_sizes),
            prefix_result=(prefix_out, prefix_lse),
        )
    launch_paged_attention(
        q,
        k_cache,
        v_cache,
        block_table,
        context_lens,
        scale,
        part=SUFFIX,
        out=out,
        shape=suffix_shape or choose_launch_shape(k_cache, rows, num_programs),
        rows=rows,
        prefix_lens=prefix_lens,
        prefix_result=(prefix_out, prefix_lse),
    )
    return out
