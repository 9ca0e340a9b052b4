"""Prefill attention for Hopper: one warp copies, two warp groups compute, over a list of query blocks, longest first.

A query block holds 128 rows: tokens, with as many of a KV head's query heads inside as make a power of two. Programs
are persistent and take blocks from the list in turn, forth and back, so that their loads come out even. While the
tensor cores multiply the weights of one tile with its values, the warp group computes the softmax of the next one.
"""

# Kernel parameters are typed by Gluon, constexprs are capitals by its custom.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803, N806

from __future__ import annotations

import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from blendserve_kernels.gluon_kernels.alignment import aligned

ROWS = 128  # query rows a block, half of them for each warp group
TILE = 128  # keys a tile
_STAGES = 2  # tiles of keys, and of values, in flight

# Renamed between Triton 3.6 and 3.7.
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def item_of(step, total):
    """Return the program's item of a step: forth in even steps, back in odd ones."""
    program = gl.program_id(0)
    if step % 2 == 1:
        program = gl.num_programs(0) - 1 - program
    return step * gl.num_programs(0) + program


@gluon.jit
def _load_words(step, total, head_blocks, list_ptr):
    """Return what must be copied for the program's item of a step: first token, tiles, request, first tile."""
    words = list_ptr + gl.maximum(gl.minimum(item_of(step, total), total - 1), 0) // head_blocks * 8
    is_any = total > 0
    q_token = gl.load(words, mask=is_any, other=0)
    num_tiles = gl.load(words + 3, mask=is_any, other=0)
    request = gl.load(words + 4, mask=is_any, other=0)
    first_tile = gl.load(words + 6, mask=is_any, other=0)
    return q_token, num_tiles, request, first_tile


@gluon.jit
def _load_bounds(step, total, head_blocks, list_ptr):
    """Return what must be known to attend for it: first token, tokens, first position, tiles, context length."""
    words = list_ptr + gl.maximum(gl.minimum(item_of(step, total), total - 1), 0) // head_blocks * 8
    is_any = total > 0
    q_token = gl.load(words, mask=is_any, other=0)
    num_tokens = gl.load(words + 1, mask=is_any, other=0)
    position = gl.load(words + 2, mask=is_any, other=0)
    num_tiles = gl.load(words + 3, mask=is_any, other=0)
    context_len = gl.load(words + 5, mask=is_any, other=0)
    return q_token, num_tokens, position, num_tiles, context_len


@gluon.jit
def copy_blocks(
    q_desc,
    k_desc,
    v_desc,
    block_table_ptr,
    list_length_ptr,
    list_ptr,
    q_boxes,
    k_tiles,
    v_tiles,
    q_full,
    q_empty,
    k_full,
    k_empty,
    v_full,
    v_empty,
    num_kv_heads,
    block_table_stride,
    GROUP_SIZE: gl.constexpr,
    PACK: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Copy the queries of one query block after the other, and the tiles that they see; return how many tiles."""
    PANELS: gl.constexpr = HEAD_DIM // 64
    ELEMENT_BYTES: gl.constexpr = k_desc.dtype.primitive_bitwidth // 8
    HEAD_BLOCKS: gl.constexpr = GROUP_SIZE // PACK
    head_blocks = num_kv_heads * HEAD_BLOCKS
    total = gl.load(list_length_ptr) * head_blocks
    count = 0
    # Read ahead: the list by two items, the block table by one tile.
    q_token, num_tiles, request, first_tile = _load_words(0, total, head_blocks, list_ptr)
    next_q_token, next_num_tiles, next_request, next_first_tile = _load_words(1, total, head_blocks, list_ptr)
    block = gl.load(
        block_table_ptr + request.to(gl.int64) * block_table_stride + first_tile * TILE // BLOCK_SIZE,
        mask=total > 0,
        other=0,
    )
    for step in range((total + gl.num_programs(0) - 1) // gl.num_programs(0)):
        item = item_of(step, total)
        if item < total:
            head_block = item % head_blocks
            kv_head = head_block // HEAD_BLOCKS
            table = block_table_ptr + request.to(gl.int64) * block_table_stride
            next_table = block_table_ptr + next_request.to(gl.int64) * block_table_stride
            next_item_block = gl.load(next_table + next_first_tile * TILE // BLOCK_SIZE)
            later_q_token, later_num_tiles, later_request, later_first_tile = _load_words(
                step + 2, total, head_blocks, list_ptr
            )
            q_slot = step % 2
            mbarrier.wait(q_empty.index(q_slot), (step // 2 & 1) ^ 1)
            mbarrier.expect(q_full.index(q_slot), 128 * HEAD_DIM * ELEMENT_BYTES)
            for half in gl.static_range(2):
                for panel in gl.static_range(PANELS):
                    tma.async_copy_global_to_shared(
                        q_desc,
                        [q_token + half * (64 // PACK), head_block * PACK, panel * 64],
                        q_full.index(q_slot),
                        q_boxes.index((q_slot * 2 + half) * PANELS + panel),
                    )
            for tile in range(first_tile, first_tile + num_tiles):
                cache_row = (block * num_kv_heads + kv_head) * BLOCK_SIZE + tile * TILE % BLOCK_SIZE
                block = gl.load(table + gl.minimum(tile + 1, first_tile + num_tiles - 1) * TILE // BLOCK_SIZE)
                slot = count % STAGES
                phase = (count // STAGES & 1) ^ 1
                mbarrier.wait(k_empty.index(slot), phase)
                mbarrier.expect(k_full.index(slot), TILE * HEAD_DIM * ELEMENT_BYTES)
                tma.async_copy_global_to_shared(k_desc, [cache_row, 0], k_full.index(slot), k_tiles.index(slot))
                mbarrier.wait(v_empty.index(slot), phase)
                mbarrier.expect(v_full.index(slot), TILE * HEAD_DIM * ELEMENT_BYTES)
                tma.async_copy_global_to_shared(v_desc, [cache_row, 0], v_full.index(slot), v_tiles.index(slot))
                count += 1
            block = next_item_block
            q_token, num_tiles, request, first_tile = next_q_token, next_num_tiles, next_request, next_first_tile
            next_q_token, next_num_tiles = later_q_token, later_num_tiles
            next_request, next_first_tile = later_request, later_first_tile
    return count


@gluon.jit
def _softmax(scores, row_max, row_sum, scale_log2e):
    """Return the weights of a tile's scores, and what becomes of the rows' maximum and sum, and of what was summed."""
    new_max = gl.maximum(row_max, gl.max(scores, axis=1) * scale_log2e)
    weights = gl.exp2(scores * scale_log2e - new_max[:, None])
    decay = gl.exp2(row_max - new_max)
    return weights, new_max, row_sum * decay + gl.sum(weights, axis=1), decay


@gluon.jit
def attend_to_first_tile(
    count,
    q_tile,
    k_tiles,
    k_full,
    k_empty,
    row_positions,
    scale_log2e,
    IS_MASKED: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    SCORES: gl.constexpr,
):
    """Return the weights of the first tile, which holds a key for every row, and the rows' maximum and sum."""
    slot = count % STAGES
    mbarrier.wait(k_full.index(slot), count // STAGES & 1)
    scores = warpgroup_mma(
        q_tile,
        k_tiles.index(slot).permute((1, 0)),
        gl.zeros([64, TILE], gl.float32, SCORES),
        use_acc=False,
    )
    _barrier()
    mbarrier.arrive(k_empty.index(slot), count=1)
    if IS_MASKED:
        keys = gl.arange(0, TILE, gl.SliceLayout(0, SCORES))
        scores = gl.where(keys[None, :] <= row_positions[:, None], scores, float("-inf"))
    row_max = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    row_sum = gl.zeros([64], gl.float32, gl.SliceLayout(1, SCORES))
    weights, row_max, row_sum, _decay = _softmax(scores, row_max, row_sum, scale_log2e)
    return weights, row_max, row_sum


@gluon.jit
def attend_to_tiles(
    first_tile,
    end_tile,
    count,
    q_tile,
    k_tiles,
    v_tiles,
    k_full,
    k_empty,
    v_full,
    v_empty,
    row_positions,
    weights,
    accumulator,
    row_max,
    row_sum,
    scale_log2e,
    IS_MASKED: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    SCORES: gl.constexpr,
    WEIGHTS: gl.constexpr,
):
    """Multiply the weights of tile n - 1 with its values while those of tile n are made, for n in the given range."""
    for tile in range(first_tile, end_tile):
        slot = count % STAGES
        last_slot = (count - 1) % STAGES
        mbarrier.wait(k_full.index(slot), count // STAGES & 1)
        scores = warpgroup_mma(
            q_tile,
            k_tiles.index(slot).permute((1, 0)),
            gl.zeros([64, TILE], gl.float32, SCORES),
            use_acc=False,
            is_async=True,
        )
        mbarrier.wait(v_full.index(last_slot), (count - 1) // STAGES & 1)
        accumulator = warpgroup_mma(weights, v_tiles.index(last_slot), accumulator, is_async=True)
        scores = warpgroup_mma_wait(1, deps=(scores,))
        _barrier()
        mbarrier.arrive(k_empty.index(slot), count=1)
        if IS_MASKED:
            keys = tile * TILE + gl.arange(0, TILE, gl.SliceLayout(0, SCORES))
            scores = gl.where(keys[None, :] <= row_positions[:, None], scores, float("-inf"))
        new_weights, row_max, row_sum, decay = _softmax(scores, row_max, row_sum, scale_log2e)
        accumulator = warpgroup_mma_wait(0, deps=(accumulator,))
        _barrier()
        mbarrier.arrive(v_empty.index(last_slot), count=1)
        accumulator = accumulator * gl.convert_layout(decay, gl.SliceLayout(1, accumulator.type.layout))[:, None]
        weights = gl.convert_layout(new_weights.to(v_tiles.dtype), WEIGHTS)
        count += 1
    return count, weights, accumulator, row_max, row_sum


@gluon.jit
def _attend_to_blocks(
    half: gl.constexpr,
    list_length_ptr,
    list_ptr,
    out_ptr,
    q_tiles,
    k_tiles,
    v_tiles,
    q_full,
    q_empty,
    k_full,
    k_empty,
    v_full,
    v_empty,
    num_kv_heads,
    scale_log2e,
    GROUP_SIZE: gl.constexpr,
    PACK: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Attend for one half, 64 rows, of each of the program's query blocks."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    HALF_TOKENS: gl.constexpr = 64 // PACK
    head_blocks = num_kv_heads * (GROUP_SIZE // PACK)
    num_heads = num_kv_heads * GROUP_SIZE
    total = gl.load(list_length_ptr) * head_blocks
    count = 0
    row = gl.arange(0, 64, gl.SliceLayout(1, SCORES))
    v_row = gl.arange(0, 16, gl.SliceLayout(1, STORED))
    out_row = gl.arange(0, 64, gl.SliceLayout(1, STORED))
    dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, STORED))
    q_token, num_tokens, first_position, num_tiles, context_len = _load_bounds(0, total, head_blocks, list_ptr)
    for step in range((total + gl.num_programs(0) - 1) // gl.num_programs(0)):
        item = item_of(step, total)
        next_q_token, next_num_tokens, next_position, next_num_tiles, next_context_len = _load_bounds(
            step + 1, total, head_blocks, list_ptr
        )
        if item < total:
            row_positions = first_position + half * HALF_TOKENS + row // PACK
            q_slot = step % 2
            q_tile = q_tiles.index(q_slot * 2 + half)

            # 1. The weights of the first tile.
            mbarrier.wait(q_full.index(q_slot), step // 2 & 1)
            new_weights, row_max, row_sum = attend_to_first_tile(
                *(count, q_tile, k_tiles, k_full, k_empty, row_positions, scale_log2e, True, TILE, STAGES, SCORES)
            )
            weights = gl.convert_layout(new_weights.to(v_tiles.dtype), WEIGHTS)
            accumulator = gl.zeros([64, HEAD_DIM], gl.float32, OUT)
            count += 1

            # 2. The tiles that all rows see in full, then those on the diagonal.
            num_full = gl.minimum(gl.maximum((first_position + 1) // TILE, 1), num_tiles)
            count, weights, accumulator, row_max, row_sum = attend_to_tiles(
                1,
                num_full,
                count,
                q_tile,
                k_tiles,
                v_tiles,
                k_full,
                k_empty,
                v_full,
                v_empty,
                row_positions,
                weights,
                accumulator,
                row_max,
                row_sum,
                scale_log2e,
                False,
                TILE,
                STAGES,
                SCORES,
                WEIGHTS,
            )
            count, weights, accumulator, row_max, row_sum = attend_to_tiles(
                num_full,
                num_tiles,
                count,
                q_tile,
                k_tiles,
                v_tiles,
                k_full,
                k_empty,
                v_full,
                v_empty,
                row_positions,
                weights,
                accumulator,
                row_max,
                row_sum,
                scale_log2e,
                True,
                TILE,
                STAGES,
                SCORES,
                WEIGHTS,
            )

            # 3. The values of the last tile. What lies behind the context may be NaN, and 0 * NaN is NaN; both warp
            # groups write the same zeros over it.
            last_slot = (count - 1) % STAGES
            mbarrier.wait(v_full.index(last_slot), (count - 1) // STAGES & 1)
            num_valid = context_len - (num_tiles - 1) * TILE
            if num_valid < TILE:
                for part in gl.static_range(TILE // 16):
                    if num_valid < (part + 1) * 16:
                        v_part = v_tiles.index(last_slot).slice(part * 16, 16, 0)
                        v = v_part.load(STORED)
                        _barrier()
                        v_part.store(gl.where((part * 16 + v_row < num_valid)[:, None], v, gl.zeros_like(v)))
                fence_async_shared()
                _barrier()
            accumulator = warpgroup_mma(weights, v_tiles.index(last_slot), accumulator)
            _barrier()
            mbarrier.arrive(v_empty.index(last_slot), count=1)

            out = accumulator / gl.convert_layout(row_sum, gl.SliceLayout(1, OUT))[:, None]
            # 4. The result, by way of the queries' place in shared memory.
            q_tile.store(out.to(v_tiles.dtype))
            _barrier()
            stored = q_tile.load(STORED)
            fence_async_shared()
            _barrier()
            mbarrier.arrive(q_empty.index(q_slot), count=1)
            token = half * HALF_TOKENS + out_row // PACK
            out_index = (q_token + token).to(gl.int64) * num_heads + item % head_blocks * PACK + out_row % PACK
            is_row = token < num_tokens
            gl.store(out_ptr + out_index[:, None] * HEAD_DIM + dims[None, :], stored, mask=is_row[:, None])
        q_token, num_tokens, first_position = next_q_token, next_num_tokens, next_position
        num_tiles, context_len = next_num_tiles, next_context_len


@gluon.jit
def _prefill_attention_kernel(
    q_desc,
    k_desc,
    v_desc,
    block_table_ptr,
    list_length_ptr,
    list_ptr,
    out_ptr,
    num_kv_heads,
    block_table_stride,
    scale_log2e,
    GROUP_SIZE: gl.constexpr,
    PACK: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
):
    PANELS: gl.constexpr = HEAD_DIM // 64
    dtype: gl.constexpr = k_desc.dtype
    TILE_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    q_boxes = gl.allocate_shared_memory(dtype, [4 * PANELS, 64 // PACK, PACK, 64], q_desc.layout)
    q_tiles = q_boxes._reinterpret(dtype, [4, 64, HEAD_DIM], TILE_LAYOUT)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE, HEAD_DIM], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE, HEAD_DIM], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(2):
        mbarrier.init(q_full.index(slot), count=1)
        mbarrier.init(q_empty.index(slot), count=2)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(k_empty.index(slot), count=2)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(v_empty.index(slot), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _attend_to_blocks,
                (
                    0,
                    list_length_ptr,
                    list_ptr,
                    out_ptr,
                    q_tiles,
                    k_tiles,
                    v_tiles,
                    q_full,
                    q_empty,
                    k_full,
                    k_empty,
                    v_full,
                    v_empty,
                    num_kv_heads,
                    scale_log2e,
                    GROUP_SIZE,
                    PACK,
                    HEAD_DIM,
                    TILE,
                    STAGES,
                ),
            ),
            (
                _attend_to_blocks,
                (
                    1,
                    list_length_ptr,
                    list_ptr,
                    out_ptr,
                    q_tiles,
                    k_tiles,
                    v_tiles,
                    q_full,
                    q_empty,
                    k_full,
                    k_empty,
                    v_full,
                    v_empty,
                    num_kv_heads,
                    scale_log2e,
                    GROUP_SIZE,
                    PACK,
                    HEAD_DIM,
                    TILE,
                    STAGES,
                ),
            ),
            (
                copy_blocks,
                (
                    q_desc,
                    k_desc,
                    v_desc,
                    block_table_ptr,
                    list_length_ptr,
                    list_ptr,
                    q_boxes,
                    k_tiles,
                    v_tiles,
                    q_full,
                    q_empty,
                    k_full,
                    k_empty,
                    v_full,
                    v_empty,
                    num_kv_heads,
                    block_table_stride,
                    GROUP_SIZE,
                    PACK,
                    HEAD_DIM,
                    BLOCK_SIZE,
                    TILE,
                    STAGES,
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )


def launch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    pack: int,
    list_length: torch.Tensor,
    block_list: torch.Tensor,
    out: torch.Tensor,
    num_programs: int,
) -> None:
    """Run the kernel over a plan of query blocks of ROWS rows with `pack` heads each, and of tiles of TILE keys."""
    num_kv_heads, block_size, head_dim = k_cache.shape[1:]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    _prefill_attention_kernel[(num_programs,)](
        TensorDescriptor.from_tensor(aligned(q), [64 // pack, pack, 64], q_layout),
        TensorDescriptor.from_tensor(k_cache.view(-1, head_dim), [TILE, head_dim], layout),
        TensorDescriptor.from_tensor(v_cache.view(-1, head_dim), [TILE, head_dim], layout),
        block_table,
        list_length,
        block_list,
        out,
        num_kv_heads,
        block_table.stride(0),
        scale / math.log(2),
        GROUP_SIZE=q.shape[1] // num_kv_heads,
        PACK=pack,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        TILE=TILE,
        STAGES=_STAGES,
        num_warps=4,
    )
