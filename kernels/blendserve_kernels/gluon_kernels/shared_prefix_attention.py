"""Shared-prefix decode attention for Hopper in one launch: a program does its items of prefixes, then of suffixes.

A prefix item is a query block of `prefill_attention` over one split of the keys: a group's requests are the tokens of a
chunk that sees all of them. The suffixes are two parts of the work a program, as in `decode_attention`. All keys and
values pass through one ring of tiles, so that the suffixes' copies begin while the last tiles of prefixes are computed.

Suffixes are merged with what the splits of their prefix left, once all programs have written theirs. Programs count in
`sync` and wait for one another, so all of them must run at once: they are launched cooperatively, which sees to that.
"""

# Kernel parameters are typed by Gluon, constexprs are capitals by its custom.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment,index"
# ruff: noqa: N803, N806

from __future__ import annotations

import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from blendserve_kernels.gluon_kernels.alignment import aligned
from blendserve_kernels.gluon_kernels.decode_attention import (
    FLAG_FIRST,
    FLAG_LAST,
    SHIFT_ROWS,
    attend_to_tile,
    copy_keys,
    copy_values,
    index_at,
    leave_state,
    merge_states,
    store_result,
)
from blendserve_kernels.gluon_kernels.prefill_attention import (
    attend_to_first_tile,
    attend_to_tiles,
    copy_blocks,
    item_of,
)

TILE = 128  # keys a tile of a prefix, and of both parts of the suffixes together
BOX = 8  # keys a copy, where a tile of a suffix holds fewer
_COLUMNS = 8  # heads of a KV head's group at most
_STAGES = 2  # tiles of keys, and of values, in flight
_PANEL = 64  # columns of a copy: 128 bytes, as wide as shared memory is swizzled

_FLAG_PREFIX = gl.constexpr(1 << 11)

# Renamed between Triton 3.6 and 3.7.
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def _copy_suffix_tile(
    stream: gl.constexpr,
    step,
    slot,
    empty_phase,
    part_begin,
    part_end,
    tail,
    index,
    place,
    first_row,
    flags,
    list_length,
    list_ptr,
    descs,
    tiles,
    barriers,
    prefix_k_empty,
    prefix_v_empty,
    num_kv_heads,
    GROUP_SIZE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    TILE: gl.constexpr,
    BOX: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Copy a part's tile of a step into its half of a slot; return index, place, row and flags of the next one.

    The first tiles wait until the prefix's tile that was there is read by both warp groups, the others for their own.
    """
    q_desc, k_desc, v_desc, k_box_desc, v_box_desc = descs
    q_tiles, k_tiles, v_tiles, k_boxes, v_boxes = tiles
    k_full, v_full, empty = barriers
    if step < part_end - part_begin:
        next_index = index_at(step + 1, part_begin, part_end, tail)
        words = list_ptr + next_index % list_length * 8
        next_place, next_row, next_flags = gl.load(words), gl.load(words + 1), gl.load(words + 2)
        num_valid = flags & (FLAG_FIRST - 1)
        kv_head = index // list_length
        cache_row = place + kv_head * BLOCK_SIZE
        q_row = first_row // GROUP_SIZE * (num_kv_heads * GROUP_SIZE) + kv_head * GROUP_SIZE
        own = slot * 2 + stream
        if step < STAGES:
            mbarrier.wait(prefix_k_empty.index(slot), empty_phase)
        else:
            mbarrier.wait(empty.index(own), (step // STAGES & 1) ^ 1)
        copy_keys(
            *(q_desc, k_desc, k_box_desc, q_row, cache_row, num_valid, own, q_tiles, k_tiles, k_boxes),
            *(k_full, v_full, HEAD_DIM, TILE, BOX, COLUMNS),
        )
        if step < STAGES:
            mbarrier.wait(prefix_v_empty.index(slot), empty_phase)
        copy_values(
            *(v_desc, v_box_desc, cache_row, num_valid, own, v_tiles, v_boxes, v_full),
            *(HEAD_DIM, TILE, BOX),
        )
        index, place, first_row, flags = next_index, next_place, next_row, next_flags
    return index, place, first_row, flags


@gluon.jit
def _copy(
    work,
    GROUP_SIZE: gl.constexpr,
    PACK: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    TILE: gl.constexpr,
    BOX: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Copy what the program's prefix items need, then the tiles of both of its parts in turn."""
    prefix_descs, suffix_descs, block_table_ptr, prefix_plan, suffix_plan, prefix_tiles, suffix_tiles = work[:7]
    prefix_barriers, suffix_barriers, num_kv_heads, block_table_stride = work[7:]
    gdc_wait()  # from here on what came before is done, so what comes next may begin
    gdc_launch_dependents()
    count = copy_blocks(
        *prefix_descs,
        block_table_ptr,
        *prefix_plan,
        *prefix_tiles,
        *prefix_barriers,
        *(num_kv_heads, block_table_stride, GROUP_SIZE, PACK, HEAD_DIM, BLOCK_SIZE, TILE, STAGES),
    )
    _q_full, _q_empty, _k_full, k_empty, _v_full, v_empty = prefix_barriers
    list_length_ptr, list_ptr, parts_ptr = suffix_plan
    list_length = gl.load(list_length_ptr)
    words = parts_ptr + 2 * gl.program_id(0) * 8
    begin_0, end_0, tail_0 = gl.load(words), gl.load(words + 1), gl.load(words + 2)
    place_0, row_0, flags_0 = gl.load(words + 3), gl.load(words + 4), gl.load(words + 5)
    begin_1, end_1, tail_1 = gl.load(words + 8), gl.load(words + 9), gl.load(words + 10)
    place_1, row_1, flags_1 = gl.load(words + 11), gl.load(words + 12), gl.load(words + 13)
    index_0, index_1 = tail_0, tail_1
    for step in range(gl.maximum(end_0 - begin_0, end_1 - begin_1)):
        slot = (count + step) % STAGES
        empty_phase = ((count + step) // STAGES & 1) ^ 1
        index_0, place_0, row_0, flags_0 = _copy_suffix_tile(
            *(0, step, slot, empty_phase, begin_0, end_0, tail_0, index_0, place_0, row_0, flags_0),
            *(list_length, list_ptr, suffix_descs, suffix_tiles, suffix_barriers, k_empty, v_empty, num_kv_heads),
            *(GROUP_SIZE, HEAD_DIM, BLOCK_SIZE, TILE // 2, BOX, COLUMNS, STAGES),
        )
        index_1, place_1, row_1, flags_1 = _copy_suffix_tile(
            *(1, step, slot, empty_phase, begin_1, end_1, tail_1, index_1, place_1, row_1, flags_1),
            *(list_length, list_ptr, suffix_descs, suffix_tiles, suffix_barriers, k_empty, v_empty, num_kv_heads),
            *(GROUP_SIZE, HEAD_DIM, BLOCK_SIZE, TILE // 2, BOX, COLUMNS, STAGES),
        )


@gluon.jit
def _attend_to_prefixes(
    half: gl.constexpr,
    prefix_plan,
    prefix_out_ptr,
    prefix_lse_ptr,
    tiles,
    barriers,
    num_kv_heads,
    num_requests,
    scale_log2e,
    GROUP_SIZE: gl.constexpr,
    PACK: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Write float32 results of one half, 64 rows, of the program's prefix items; return how many tiles those had."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    HALF_TOKENS: gl.constexpr = 64 // PACK
    q_tiles, k_tiles, v_tiles = tiles
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    list_length_ptr, list_ptr = prefix_plan
    head_blocks = num_kv_heads * (GROUP_SIZE // PACK)
    num_heads = num_kv_heads * GROUP_SIZE
    total = gl.load(list_length_ptr) * head_blocks
    count = 0
    row = gl.arange(0, 64, gl.SliceLayout(1, SCORES))
    out_row = gl.arange(0, 64, gl.SliceLayout(1, OUT))
    dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, OUT))
    for step in range((total + gl.num_programs(0) - 1) // gl.num_programs(0)):
        item = item_of(step, total)
        if item < total:
            words = list_ptr + item // head_blocks * 8
            q_token, num_tokens = gl.load(words), gl.load(words + 1)
            num_tiles, split = gl.load(words + 3), gl.load(words + 7)
            # 1. All tiles, none of them masked: a prefix ends with a block.
            q_slot = step % 2
            q_tile = q_tiles.index(q_slot * 2 + half)
            mbarrier.wait(q_full.index(q_slot), step // 2 & 1)
            new_weights, row_max, row_sum = attend_to_first_tile(
                *(count, q_tile, k_tiles, k_full, k_empty, row, scale_log2e, False, TILE, STAGES, SCORES)
            )
            weights = gl.convert_layout(new_weights.to(v_tiles.dtype), WEIGHTS)
            accumulator = gl.zeros([64, HEAD_DIM], gl.float32, OUT)
            count, weights, accumulator, row_max, row_sum = attend_to_tiles(
                *(1, num_tiles, count + 1, q_tile, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty),
                *(row, weights, accumulator, row_max, row_sum, scale_log2e, False, TILE, STAGES, SCORES, WEIGHTS),
            )
            last_slot = (count - 1) % STAGES
            mbarrier.wait(v_full.index(last_slot), (count - 1) // STAGES & 1)
            accumulator = warpgroup_mma(weights, v_tiles.index(last_slot), accumulator)
            _barrier()
            mbarrier.arrive(v_empty.index(last_slot), count=1)
            # 2. The result of this split, and the logarithm of its weight.
            out = accumulator / gl.convert_layout(row_sum, gl.SliceLayout(1, OUT))[:, None]
            first_token = split * num_requests + q_token
            token = half * HALF_TOKENS + row // PACK
            lse_index = (first_token + token) * num_heads + item % head_blocks * PACK + row % PACK
            gl.store(prefix_lse_ptr + lse_index, row_max + gl.log2(row_sum), mask=token < num_tokens)
            token = half * HALF_TOKENS + out_row // PACK
            out_index = (first_token + token).to(gl.int64) * num_heads + item % head_blocks * PACK + out_row % PACK
            is_row = token < num_tokens
            gl.store(prefix_out_ptr + out_index[:, None] * HEAD_DIM + dims[None, :], out, mask=is_row[:, None])
            _barrier()
            mbarrier.arrive(q_empty.index(q_slot), count=1)
    return count


@gluon.jit
def _merge_splits(
    out,
    row_max,
    row_sum,
    first_row,
    num_rows,
    kv_head,
    num_heads,
    has_prefix,
    prefix_out_ptr,
    prefix_lse_ptr,
    split_stride,
    NUM_SPLITS: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    COLUMNS: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Merge the finished rows of a suffix with the splits of its prefix, all of them asked for before one is needed."""
    number = gl.arange(0, COLUMNS, gl.SliceLayout(1, LAYOUT))
    dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, LAYOUT))
    row = first_row + number
    is_merged = (number < num_rows) & has_prefix
    index = (row // GROUP_SIZE).to(gl.int64) * num_heads + kv_head * GROUP_SIZE + row % GROUP_SIZE
    offsets = index[:, None] * HEAD_DIM + dims[None, :]
    lses = ()
    outs = ()
    for split in gl.static_range(NUM_SPLITS):
        lse_ptrs = prefix_lse_ptr + split * split_stride + index
        lses = lses + (gl.load(lse_ptrs, mask=is_merged, other=float("-inf"), cache_modifier=".cg"),)  # noqa: RUF005
        out_ptrs = prefix_out_ptr + offsets + split * split_stride * HEAD_DIM
        outs = outs + (gl.load(out_ptrs, mask=is_merged[:, None], other=0.0, cache_modifier=".cg"),)  # noqa: RUF005
    new_max = row_max
    for split in gl.static_range(NUM_SPLITS):
        new_max = gl.maximum(new_max, lses[split])
    safe_max = gl.where(new_max == float("-inf"), 0.0, new_max)
    own_weight = gl.exp2(row_max - safe_max)
    out = out * own_weight[:, None]
    row_sum = row_sum * own_weight
    for split in gl.static_range(NUM_SPLITS):
        # A prefix of fewer splits leaves the others' lse at -inf, and anything as their result.
        prefix_out = gl.where((lses[split] > float("-inf"))[:, None], outs[split], 0.0)
        prefix_weight = gl.exp2(lses[split] - safe_max)
        out = out + prefix_out * prefix_weight[:, None]
        row_sum = row_sum + prefix_weight
    return out, row_sum


@gluon.jit
def _attend_to_suffixes(
    stream: gl.constexpr,
    count,
    num_arrived,
    num_arrivals,
    sync_ptr,
    suffix_plan,
    out_ptr,
    prefix_result,
    workspace,
    tiles,
    weights_own,
    barriers,
    num_kv_heads,
    scale_log2e,
    NUM_SPLITS: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    TILE: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Work through one part, as `decode_attention` does; wait for all prefix items before the first result.

    count: tiles of prefixes that have passed through the ring. workspace: states, extrema and counters of cut items.
    """
    list_length_ptr, list_ptr, parts_ptr = suffix_plan
    list_length = gl.load(list_length_ptr)
    num_parts = gl.load(list_length_ptr + 1)
    part = 2 * gl.program_id(0) + stream
    words = parts_ptr + part * 8
    part_begin, part_end, index = gl.load(words), gl.load(words + 1), gl.load(words + 2)
    first_row, flags, item_entry = gl.load(words + 4), gl.load(words + 5), gl.load(words + 6)
    total_tiles = list_length * num_kv_heads
    num_heads = num_kv_heads * GROUP_SIZE
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    if part < num_parts:
        accumulator = gl.zeros([HEAD_DIM, COLUMNS], gl.float32, MMA)
        row_max = gl.full([COLUMNS], float("-inf"), gl.float32, gl.SliceLayout(0, MMA))
        weight_sums = gl.zeros([TILE, COLUMNS], gl.float32, MMA)
        tail = index
        for step in range(part_end - part_begin):
            next_index = index_at(step + 1, part_begin, part_end, tail)
            words = list_ptr + next_index % list_length * 8
            next_row, next_flags, next_entry = gl.load(words + 1), gl.load(words + 2), gl.load(words + 3)
            accumulator, row_max, weight_sums = attend_to_tile(
                (count + step) % STAGES * 2 + stream,
                step // STAGES & 1,
                flags & (FLAG_FIRST - 1),
                ((flags & FLAG_FIRST) != 0) | (index == part_begin),
                *(accumulator, row_max, weight_sums),
                *tiles,
                weights_own,
                *barriers,
                *(scale_log2e, HEAD_DIM, TILE, COLUMNS, MMA),
            )
            if ((flags & FLAG_LAST) != 0) | (index == part_end - 1):
                kv_head = index // list_length
                item_begin = kv_head * list_length + item_entry
                rows = (first_row, flags >> SHIFT_ROWS, kv_head, num_heads)
                has_prefix = (flags & _FLAG_PREFIX) != 0
                out = gl.convert_layout(gl.permute(accumulator, (1, 0)), ROWS)
                out_max = gl.convert_layout(row_max, gl.SliceLayout(1, ROWS))
                out_sum = gl.convert_layout(gl.sum(weight_sums, axis=0), gl.SliceLayout(1, ROWS))
                while num_arrived < num_arrivals:
                    num_arrived = gl.atomic_add(sync_ptr, 0, sem="acquire", scope="gpu")
                if ((flags & FLAG_LAST) != 0) & (item_begin >= part_begin):
                    out, out_sum = _merge_splits(
                        *(out, out_max, out_sum),
                        *rows,
                        has_prefix,
                        *prefix_result,
                        *(NUM_SPLITS, GROUP_SIZE, HEAD_DIM, COLUMNS, ROWS),
                    )
                    store_result(out, out_sum, *rows, out_ptr, GROUP_SIZE, HEAD_DIM, COLUMNS, ROWS)
                else:
                    num_tiles = gl.load(list_ptr + item_entry * 8 + 4)
                    is_last, first_part, last_part = leave_state(
                        *(out, out_max, out_sum, part, part_begin, item_begin, num_tiles, total_tiles, num_parts),
                        *workspace,
                        *(HEAD_DIM, COLUMNS, ROWS),
                    )
                    if is_last:
                        merged, merged_max, merged_sum = merge_states(
                            *(item_begin, first_part, last_part, total_tiles, num_parts, workspace[0], workspace[1]),
                            *(HEAD_DIM, COLUMNS, ROWS),
                        )
                        merged, merged_sum = _merge_splits(
                            *(merged, merged_max, merged_sum),
                            *rows,
                            has_prefix,
                            *prefix_result,
                            *(NUM_SPLITS, GROUP_SIZE, HEAD_DIM, COLUMNS, ROWS),
                        )
                        store_result(merged, merged_sum, *rows, out_ptr, GROUP_SIZE, HEAD_DIM, COLUMNS, ROWS)
            index, first_row, flags, item_entry = next_index, next_row, next_flags, next_entry


@gluon.jit
def _attend(
    half: gl.constexpr,
    work,
    NUM_SPLITS: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    PACK: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    TILE: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Attend for one half of each prefix item and one of the program's two parts of the suffixes."""
    prefix_plan, suffix_plan, out_ptr, prefix_result, workspace, sync_ptr, prefix_tiles, suffix_tiles = work[:8]
    weights_buffer, prefix_barriers, suffix_barriers, num_kv_heads, num_requests, scale_log2e = work[8:]
    gdc_wait()
    count = _attend_to_prefixes(
        *(half, prefix_plan, prefix_result[0], prefix_result[1], prefix_tiles, prefix_barriers),
        *(num_kv_heads, num_requests, scale_log2e, GROUP_SIZE, PACK, HEAD_DIM, TILE, STAGES),
    )
    # Every warp group of every program arrives once a launch, so the count tells which launch this is.
    _barrier()  # all threads' results are written before they are announced
    num_arrived = gl.atomic_add(sync_ptr, 1, sem="acq_rel", scope="gpu")
    num_arrivals = 2 * gl.num_programs(0)
    num_arrivals = (num_arrived // num_arrivals + 1) * num_arrivals
    _attend_to_suffixes(
        *(half, count, num_arrived, num_arrivals, sync_ptr, suffix_plan, out_ptr, prefix_result, workspace),
        *(suffix_tiles, weights_buffer.index(half), suffix_barriers, num_kv_heads, scale_log2e),
        *(NUM_SPLITS, GROUP_SIZE, HEAD_DIM, TILE // 2, COLUMNS, STAGES),
    )


@gluon.jit
def _shared_prefix_kernel(
    prefix_q_desc,
    prefix_k_desc,
    prefix_v_desc,
    q_desc,
    k_desc,
    v_desc,
    k_box_desc,
    v_box_desc,
    block_table_ptr,
    block_list_length_ptr,
    block_list_ptr,
    list_length_ptr,
    list_ptr,
    parts_ptr,
    out_ptr,
    prefix_out_ptr,
    prefix_lse_ptr,
    state_ptr,
    extrema_ptr,
    counters_ptr,
    sync_ptr,
    num_kv_heads,
    num_requests,
    block_table_stride,
    scale_log2e,
    NUM_SPLITS: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    PACK: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    TILE: gl.constexpr,
    BOX: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
):
    PANELS: gl.constexpr = HEAD_DIM // 64
    HALF: gl.constexpr = TILE // 2
    BOXES: gl.constexpr = 2 * STAGES * PANELS * (HALF // BOX)
    dtype: gl.constexpr = k_desc.dtype
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    prefix_q_boxes = gl.allocate_shared_memory(dtype, [4 * PANELS, 64 // PACK, PACK, 64], prefix_q_desc.layout)
    prefix_q_tiles = prefix_q_boxes._reinterpret(dtype, [4, 64, HEAD_DIM], LAYOUT)
    prefix_k_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE, HEAD_DIM], LAYOUT)
    prefix_v_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE, HEAD_DIM], LAYOUT)
    # One tile of a prefix is two of suffixes, one for each part; boxes of a tile lie in it panel by panel.
    k_tiles = prefix_k_tiles._reinterpret(dtype, [2 * STAGES, HALF, HEAD_DIM], LAYOUT)
    v_tiles = prefix_v_tiles._reinterpret(dtype, [2 * STAGES, HALF, HEAD_DIM], LAYOUT)
    k_boxes = prefix_k_tiles._reinterpret(dtype, [BOXES, BOX, 64], LAYOUT)
    v_boxes = prefix_v_tiles._reinterpret(dtype, [BOXES, BOX, 64], LAYOUT)
    q_tiles = gl.allocate_shared_memory(dtype, [2 * STAGES, COLUMNS, HEAD_DIM], LAYOUT)
    weights_buffer = gl.allocate_shared_memory(dtype, [2, COLUMNS, HALF], LAYOUT)
    prefix_q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    prefix_q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    prefix_k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    prefix_k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    prefix_v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    prefix_v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(2):
        mbarrier.init(prefix_q_full.index(slot), count=1)
        mbarrier.init(prefix_q_empty.index(slot), count=2)
    for slot in gl.static_range(STAGES):
        mbarrier.init(prefix_k_full.index(slot), count=1)
        mbarrier.init(prefix_k_empty.index(slot), count=2)
        mbarrier.init(prefix_v_full.index(slot), count=1)
        mbarrier.init(prefix_v_empty.index(slot), count=2)
    for slot in gl.static_range(2 * STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    fence_async_shared()
    prefix_plan = (block_list_length_ptr, block_list_ptr)
    suffix_plan = (list_length_ptr, list_ptr, parts_ptr)
    prefix_barriers = (prefix_q_full, prefix_q_empty, prefix_k_full, prefix_k_empty, prefix_v_full, prefix_v_empty)
    suffix_barriers = (k_full, v_full, empty)
    split_stride = num_requests * num_kv_heads * GROUP_SIZE
    to_attend = (
        prefix_plan,
        suffix_plan,
        out_ptr,
        (prefix_out_ptr, prefix_lse_ptr, split_stride),
        (state_ptr, extrema_ptr, counters_ptr),
        sync_ptr,
        (prefix_q_tiles, prefix_k_tiles, prefix_v_tiles),
        (q_tiles, k_tiles, v_tiles),
        weights_buffer,
        prefix_barriers,
        suffix_barriers,
        num_kv_heads,
        num_requests,
        scale_log2e,
    )
    to_copy = (
        (prefix_q_desc, prefix_k_desc, prefix_v_desc),
        (q_desc, k_desc, v_desc, k_box_desc, v_box_desc),
        block_table_ptr,
        prefix_plan,
        suffix_plan,
        (prefix_q_boxes, prefix_k_tiles, prefix_v_tiles),
        (q_tiles, k_tiles, v_tiles, k_boxes, v_boxes),
        prefix_barriers,
        suffix_barriers,
        num_kv_heads,
        block_table_stride,
    )
    gl.warp_specialize(
        [
            (_attend, (0, to_attend, NUM_SPLITS, GROUP_SIZE, PACK, HEAD_DIM, TILE, COLUMNS, STAGES)),
            (_attend, (1, to_attend, NUM_SPLITS, GROUP_SIZE, PACK, HEAD_DIM, TILE, COLUMNS, STAGES)),
            (_copy, (to_copy, GROUP_SIZE, PACK, HEAD_DIM, BLOCK_SIZE, TILE, BOX, COLUMNS, STAGES)),
        ],
        [4, 1],
        [216, 72],
    )


def launch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    pack: int,
    block_list_length: torch.Tensor,
    block_list: torch.Tensor,
    list_length: torch.Tensor,
    tile_list: torch.Tensor,
    parts: torch.Tensor,
    counters: torch.Tensor,
    sync: torch.Tensor,
    prefix_lse: torch.Tensor,
    out: torch.Tensor,
    num_programs: int,
) -> None:
    """Run the kernel over a plan of query blocks with `pack` heads each, and one of tiles of TILE // 2 keys.

    prefix_lse: float32 [num_splits, B, num_heads], base 2; -inf where a prefix has no such split. sync: int32 [1], zero
    before the first launch; all launches that share it must have the same number of programs, at most one for each SM.
    Launched by programmatic dependent launch too: it waits for what came before it reads anything.
    """
    num_kv_heads, block_size, head_dim = k_cache.shape[1:]
    num_state_rows = 4 * num_programs * _COLUMNS
    state = torch.empty(num_state_rows, head_dim, dtype=torch.float32, device=q.device)
    extrema = torch.empty(num_state_rows, 2, dtype=torch.float32, device=q.device)
    prefix_out = torch.empty(*prefix_lse.shape, head_dim, dtype=torch.float32, device=q.device)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    q_rows, keys, values = (x.view(-1, head_dim) for x in (q.contiguous(), k_cache, v_cache))
    _shared_prefix_kernel[(num_programs,)](
        TensorDescriptor.from_tensor(aligned(q), [64 // pack, pack, _PANEL], q_layout),
        TensorDescriptor.from_tensor(keys, [TILE, head_dim], layout),
        TensorDescriptor.from_tensor(values, [TILE, head_dim], layout),
        TensorDescriptor.from_tensor(aligned(q_rows), [_COLUMNS, head_dim], layout),
        TensorDescriptor.from_tensor(keys, [TILE // 2, head_dim], layout),
        TensorDescriptor.from_tensor(values, [TILE // 2, head_dim], layout),
        TensorDescriptor.from_tensor(keys, [BOX, _PANEL], layout),
        TensorDescriptor.from_tensor(values, [BOX, _PANEL], layout),
        block_table,
        block_list_length,
        block_list,
        list_length,
        tile_list,
        parts,
        out,
        prefix_out,
        prefix_lse,
        state,
        extrema,
        counters,
        sync,
        num_kv_heads,
        q.shape[0],
        block_table.stride(0),
        scale / math.log(2),
        NUM_SPLITS=prefix_lse.shape[0],
        GROUP_SIZE=q.shape[1] // num_kv_heads,
        PACK=pack,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        TILE=TILE,
        BOX=BOX,
        COLUMNS=_COLUMNS,
        STAGES=_STAGES,
        num_warps=4,
        launch_pdl=True,
        launch_cooperative_grid=True,
    )
