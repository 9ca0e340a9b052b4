"""Launches shared-prefix decode attention: the prefix part for a whole group at once, then each request's suffix.

On Hopper one kernel does both: the requests of a group are the tokens of a chunk that sees all keys, cut into a few
splits of the keys, so that one group alone keeps the GPU busy; the suffixes merge them.
"""

# Kernel parameters are typed by Triton, constexprs are capitals by its custom.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from blendserve_kernels.triton_kernels.decode_attention import (
    PREFIX_PART,
    SUFFIX_PART,
    DecodePlan,
    LaunchShape,
    choose_decode_shape,
    choose_launch_shape,
    device_limits,
    launch_paged_attention,
    make_plan,
    rows_of_group,
)
from blendserve_kernels.triton_kernels.prefill_attention import PLANNED_ROWS, PLANNED_TILE, fits_hopper_kernel

_PREFIX_ROWS = 64  # query rows of a prefix tile: one warp group's matrix instruction


@dataclass(frozen=True, slots=True)
class SharedPrefixPlan:
    """The plans of both parts, made by `plan_shared_prefix_triton`; valid for every layer of a step.

    Launches that share a plan must follow one another, on one stream: counters and `lse` are theirs in turn.
    """

    prefix: DecodePlan | SplitPrefixPlan | None  # None: no groups
    suffix: DecodePlan


@dataclass(frozen=True, slots=True)
class SplitPrefixPlan:
    """The prefix part for Hopper: query blocks of up to PLANNED_ROWS rows, each over one split of the keys.

    The suffixes' plan says how many programs there are.
    """

    pack: int  # heads of a KV head's group that lie in one query block
    block_list: torch.Tensor  # int32 [max_items, 8], as in `prefill_attention.PrefillPlan`
    list_length: torch.Tensor  # int32 [1], on the device
    lse: torch.Tensor  # float32 [num_splits, B, num_heads]; stays -inf where a prefix has fewer splits
    sync: torch.Tensor  # int32 [1], how often warp groups were done with their prefix items, over all launches


_ANY_POSITION = tl.constexpr(1 << 30)  # behind every prefix: nothing is masked


@triton.jit
def _plan_splits_kernel(
    prefix_lens_ptr,
    group_starts_ptr,
    group_sizes_ptr,
    list_length_ptr,
    list_ptr,
    sync_ptr,
    num_groups,
    most_blocks,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
):
    """List the items of one group per program, behind those of the groups before it.

    ROWS: requests a block. most_blocks: how many blocks of one KV head all programs together can take at one time; a
    prefix is split only as far as that goes.
    """
    this_group = tl.program_id(0)
    groups = tl.arange(0, PADDED_GROUPS)
    sizes = tl.load(group_sizes_ptr + groups, mask=groups < num_groups, other=0)
    starts = tl.load(group_starts_ptr + groups, mask=groups < num_groups, other=0)
    tiles = tl.load(prefix_lens_ptr + starts, mask=sizes > 0, other=0) // TILE
    blocks = tl.where(tiles > 0, (sizes + ROWS - 1) // ROWS, 0)
    most_splits = tl.minimum(tl.maximum(most_blocks // tl.maximum(tl.sum(blocks), 1), 1), MAX_SPLITS)
    items = blocks * tl.minimum(tiles, most_splits)
    tl.store(list_length_ptr, tl.sum(items), mask=this_group == 0)
    tl.store(sync_ptr, 0, mask=this_group == 0)
    place = tl.sum(tl.where(groups < this_group, items, 0))
    start = tl.sum(tl.where(groups == this_group, starts, 0))
    size = tl.sum(tl.where(groups == this_group, sizes, 0))
    num_tiles = tl.sum(tl.where(groups == this_group, tiles, 0))
    num_splits = tl.minimum(num_tiles, most_splits)
    split = tl.arange(0, MAX_SPLITS)
    is_split = split < num_splits
    first_tile = num_tiles * split // tl.maximum(num_splits, 1)
    end_tile = num_tiles * (split + 1) // tl.maximum(num_splits, 1)
    for begin in tl.range(0, tl.where(num_tiles > 0, size, 0), ROWS):
        words = list_ptr + (place + split) * 8
        tl.store(words, start + begin + split * 0, mask=is_split)
        tl.store(words + 1, tl.minimum(size - begin, ROWS) + split * 0, mask=is_split)
        tl.store(words + 2, split * 0 + _ANY_POSITION, mask=is_split)
        tl.store(words + 3, end_tile - first_tile, mask=is_split)
        tl.store(words + 4, start + split * 0, mask=is_split)
        tl.store(words + 5, split * 0 + _ANY_POSITION, mask=is_split)
        tl.store(words + 6, first_tile, mask=is_split)
        tl.store(words + 7, split, mask=is_split)
        place += num_splits


def plan_splits(
    prefix_lens: torch.Tensor,
    group_starts: torch.Tensor,
    group_sizes: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    num_programs: int,
) -> SplitPrefixPlan:
    """List the prefix part of a step on the device; arguments as for `shared_prefix_attention.plan_shared_prefix`."""
    num_requests, num_groups = prefix_lens.shape[0], group_starts.shape[0]
    group_size = num_heads // num_kv_heads
    pack = group_size & -group_size
    rows = PLANNED_ROWS // pack
    num_splits = 8 if num_requests <= 256 else 4  # results of splits are written and read: few where requests are many
    max_items = (num_requests // rows + num_groups) * num_splits
    device = prefix_lens.device
    block_list = torch.empty(max_items, 8, dtype=torch.int32, device=device)
    list_length, sync = (torch.empty(1, dtype=torch.int32, device=device) for _ in range(2))
    _plan_splits_kernel[(num_groups,)](
        prefix_lens,
        group_starts,
        group_sizes,
        list_length,
        block_list,
        sync,
        num_groups,
        max(1, num_programs // (num_kv_heads * (group_size // pack))),
        ROWS=rows,
        TILE=PLANNED_TILE,
        MAX_SPLITS=num_splits,
        PADDED_GROUPS=max(16, triton.next_power_of_2(num_groups)),
        num_warps=4,
    )
    lse = torch.full((num_splits, num_requests, num_heads), float("-inf"), device=device)
    return SplitPrefixPlan(pack, block_list, list_length, lse, sync)


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
) -> SharedPrefixPlan:
    """Launch `shared_prefix_attention.plan_shared_prefix`; arguments as there, unchecked."""
    group_size = num_heads // k_cache.shape[1]
    rows = rows_of_group(group_size)
    prefix: DecodePlan | SplitPrefixPlan | None = None
    suffix_shape = choose_decode_shape(k_cache, group_size, num_programs)
    if group_starts.shape[0] and suffix_shape.is_for_hopper and fits_hopper_kernel(num_heads, k_cache):
        # Programs wait for one another, so there may be no more than run at once: one an SM.
        most_programs = min(suffix_shape.num_programs, device_limits(k_cache.device)[0])
        suffix_shape = replace(suffix_shape, num_programs=most_programs)
        prefix = plan_splits(prefix_lens, group_starts, group_sizes, num_heads, k_cache.shape[1], most_programs)
    elif group_starts.shape[0]:
        prefix_rows = max(_PREFIX_ROWS, rows)
        suffix_shape = choose_launch_shape(k_cache, rows, num_programs)
        prefix = make_plan(
            k_cache,
            block_table,
            context_lens,
            group_size,
            part=PREFIX_PART,
            rows=prefix_rows,
            shape=_choose_prefix_shape(k_cache, prefix_rows, num_programs),
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
        shape=suffix_shape,
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
    prefix, suffix = plan.prefix, plan.suffix
    if isinstance(prefix, SplitPrefixPlan):
        from blendserve_kernels.gluon_kernels import shared_prefix_attention

        shared_prefix_attention.launch(
            *(q, k_cache, v_cache, block_table, scale, prefix.pack, prefix.list_length, prefix.block_list),
            *(suffix.list_length, suffix.tile_list, suffix.parts, suffix.counters, prefix.sync, prefix.lse, out),
            suffix.shape.num_programs,
        )
        return out
    prefix_result = None
    if prefix is not None:
        prefix_out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
        prefix_result = (prefix_out, torch.empty(q.shape[:2], dtype=torch.float32, device=q.device))
        launch_paged_attention(q, k_cache, v_cache, block_table, scale, prefix, prefix_out, prefix_result)
    launch_paged_attention(q, k_cache, v_cache, block_table, scale, suffix, out, prefix_result)
    return out
