"""Launches shared-prefix decode attention: the prefix part for a whole group at once, then each request's suffix."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from blendserve_kernels.triton_kernels.decode_attention import (
    PREFIX_PART,
    SUFFIX_PART,
    DecodePlan,
    LaunchShape,
    choose_decode_shape,
    choose_launch_shape,
    launch_paged_attention,
    make_plan,
    rows_of_group,
)

_PREFIX_ROWS = 64  # query rows of a prefix tile: one warp group's matrix instruction


@dataclass(frozen=True, slots=True)
class SharedPrefixPlan:
    """The plans of both parts, made by `plan_shared_prefix_triton`; valid for every layer of a step."""

    prefix: DecodePlan | None  # None: no groups
    suffix: DecodePlan


def _choose_prefix_shape(k_cache: torch.Tensor, rows: int, num_programs: int | None) -> LaunchShape:
    """As many programs as fit that every KV head has equally many: long items are then cut evenly."""
    shape = choose_launch_shape(k_cache, rows, num_programs)
    num_kv_heads = k_cache.shape[1]
    if shape.num_programs < num_kv_heads:
        return shape
    return replace(shape, num_programs=shape.num_programs - shape.num_programs % num_kv_heads)


def plan_shared_prefix_triton(
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    prefix_lens: torch.Tensor,
    group_starts: torch.Tensor,
    group_sizes: torch.Tensor,
    num_heads: int,
    num_programs: int | None = None,
    prefix_rows: int = _PREFIX_ROWS,
    prefix_shape: LaunchShape | None = None,
) -> SharedPrefixPlan:
    """Launch `shared_prefix_attention.plan_shared_prefix`; arguments as there, unchecked."""
    group_size = num_heads // k_cache.shape[1]
    rows = rows_of_group(group_size)
    prefix_rows = max(prefix_rows, rows)
    prefix = None
    if group_starts.shape[0]:
        prefix = make_plan(
            k_cache,
            block_table,
            context_lens,
            group_size,
            part=PREFIX_PART,
            rows=prefix_rows,
            shape=prefix_shape or _choose_prefix_shape(k_cache, prefix_rows, num_programs),
            prefix_lens=prefix_lens,
            groups=(group_starts, group_sizes),
        )
    suffix = make_plan(
        k_cache,
        block_table,
        context_lens,
        group_size,
        part=SUFFIX_PART,
        rows=rows,
        shape=choose_decode_shape(k_cache, group_size, num_programs),
        prefix_lens=prefix_lens,
    )
    return SharedPrefixPlan(prefix, suffix)


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
    plan: SharedPrefixPlan | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launch `shared_prefix_attention.shared_prefix_decode_attention`; arguments as there, unchecked. No host sync."""
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    if plan is None:
        plan = plan_shared_prefix_triton(
            k_cache, block_table, context_lens, prefix_lens, group_starts, group_sizes, q.shape[1], num_programs
        )
    prefix_out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    prefix_result = (prefix_out, torch.empty(q.shape[:2], dtype=torch.float32, device=q.device))
    if plan.prefix is not None:
        launch_paged_attention(q, k_cache, v_cache, block_table, scale, plan.prefix, prefix_out, prefix_result)
    launch_paged_attention(q, k_cache, v_cache, block_table, scale, plan.suffix, out, prefix_result)
    return out
