"""Triton decode attention over the paged cache: persistent, split over KV, for plain, prefix and suffix parts alike.

The work is one list of KV tiles: sequence by sequence, KV head by KV head, block of query rows by block of rows. Each
of P programs takes an equal contiguous part of the list, whatever the context lengths, so P can be any number of SMs.
An item (one sequence, head and block of rows) that lies within one part is finished by its program. One that is cut
leaves its state (accumulator, maximum, sum) per program, and the last program to arrive merges the states in order.

A sequence is a request with its own KV (`PLAIN`), a request's KV behind a shared prefix (`SUFFIX`, merged with the
prefix part's result at the end), or a group of requests over the prefix that they share (`PREFIX`).
"""

# Kernel parameters are typed by Triton, constexprs are capitals by its custom.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803, SIM108

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

PLAIN = tl.constexpr(0)
SUFFIX = tl.constexpr(1)
PREFIX = tl.constexpr(2)

_MAX_PROGRAMS = 1024
_SEGMENT = 512  # tiles that a program lists at a time
_INTERPRETED_PROGRAMS = 5  # without a GPU: few, and no divisor of common sizes, so that items are cut
_arrival_counters: dict[tuple[torch.device, int], torch.Tensor] = {}


@triton.jit
def _load_sequence(
    sequence,
    num_sequences,
    context_lens_ptr,
    prefix_lens_ptr,
    group_starts_ptr,
    group_sizes_ptr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
):
    """Return (first request, requests, first KV token, end of KV, tiles) of one sequence or of a vector of them."""
    is_real = sequence < num_sequences
    if PART == PREFIX:
        first_request = tl.load(group_starts_ptr + sequence, mask=is_real, other=0)
        num_requests = tl.load(group_sizes_ptr + sequence, mask=is_real, other=0)
        kv_begin = first_request * 0
        kv_end = tl.load(prefix_lens_ptr + first_request, mask=is_real & (num_requests > 0), other=0)
    else:
        first_request = sequence
        num_requests = is_real.to(tl.int32)
        kv_end = tl.load(context_lens_ptr + sequence, mask=is_real, other=0)
        if PART == SUFFIX:
            kv_begin = tl.load(prefix_lens_ptr + sequence, mask=is_real, other=0)
        else:
            kv_begin = kv_end * 0
    num_tiles = tl.maximum((kv_end - kv_begin + TILE - 1) // TILE, 1)  # an empty context still owes its zeros
    return first_request, num_requests, kv_begin, kv_end, num_tiles


@triton.jit
def _program_of(tile, total_tiles, num_programs):
    """Return the program whose part [total * p // P, total * (p + 1) // P) holds `tile`."""
    return (((tile + 1).to(tl.int64) * num_programs - 1) // total_tiles).to(tl.int32)


@triton.jit
def _begin_of(program, total_tiles, num_programs):
    return ((total_tiles.to(tl.int64) * program) // num_programs).to(tl.int32)


@triton.jit
def _row_offsets(
    first_request, num_requests, kv_head, row_block, num_heads, GROUP_SIZE: tl.constexpr, ROWS: tl.constexpr
):
    """Return the index request * num_heads + head of each query row of a block, int64 [ROWS], and which rows exist."""
    row = row_block * ROWS + tl.arange(0, ROWS)
    request = first_request + row // GROUP_SIZE
    head = kv_head * GROUP_SIZE + row % GROUP_SIZE
    return request.to(tl.int64) * num_heads + head, row < num_requests * GROUP_SIZE


@triton.jit
def _store_result(
    accumulator,
    row_max,
    row_sum,
    row_index,
    is_row,
    has_prefix,
    out_ptr,
    lse_ptr,
    prefix_out_ptr,
    prefix_lse_ptr,
    PART: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Normalise finished rows and write them; a suffix is merged with its prefix first, a prefix leaves its lse too."""
    dims = tl.arange(0, HEAD_DIM)
    offsets = row_index[:, None] * HEAD_DIM + dims[None, :]
    if PART == SUFFIX:
        is_merged = is_row & has_prefix
        prefix_lse = tl.load(prefix_lse_ptr + row_index, mask=is_merged, other=float("-inf"))
        prefix_out = tl.load(prefix_out_ptr + offsets, mask=is_merged[:, None], other=0.0)
        new_max = tl.maximum(row_max, prefix_lse)
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        own_weight = tl.exp2(row_max - safe_max)
        prefix_weight = tl.exp2(prefix_lse - safe_max)
        accumulator = accumulator * own_weight[:, None] + prefix_out * prefix_weight[:, None]
        row_sum = row_sum * own_weight + prefix_weight
    safe_sum = tl.where(row_sum == 0.0, 1.0, row_sum)  # no keys at all: zeros, and an lse of -inf from the maximum
    out = accumulator / safe_sum[:, None]
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=is_row[:, None])
    if PART == PREFIX:
        tl.store(lse_ptr + row_index, row_max + tl.log2(safe_sum), mask=is_row)


@triton.jit
def _store_state(
    accumulator, row_max, row_sum, slot, is_wanted, state_ptr, extrema_ptr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Leave the state of a cut item in a slot of the workspace."""
    rows = slot * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, HEAD_DIM)
    is_stored = (rows >= 0) & is_wanted
    tl.store(state_ptr + rows[:, None] * HEAD_DIM + dims[None, :], accumulator, mask=is_stored[:, None])
    tl.store(extrema_ptr + rows * 2, row_max, mask=is_stored)
    tl.store(extrema_ptr + rows * 2 + 1, row_sum, mask=is_stored)


@triton.jit
def _arrive_and_merge(
    item_begin,
    item_tiles,
    total_tiles,
    num_programs,
    row_index,
    is_row,
    has_prefix,
    counters_ptr,
    state_ptr,
    extrema_ptr,
    out_ptr,
    lse_ptr,
    prefix_out_ptr,
    prefix_lse_ptr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Count this program in at a cut item; the last one to come merges all states in the order of the programs."""
    first_program = _program_of(item_begin, total_tiles, num_programs)
    last_program = _program_of(item_begin + item_tiles - 1, total_tiles, num_programs)
    num_arrived = tl.atomic_add(counters_ptr + first_program, 1, sem="acq_rel", scope="gpu")
    if num_arrived == last_program - first_program:
        tl.store(counters_ptr + first_program, 0)  # ready for the next launch
        dims = tl.arange(0, HEAD_DIM)
        accumulator = tl.zeros([ROWS, HEAD_DIM], dtype=tl.float32)
        row_max = tl.full([ROWS], float("-inf"), dtype=tl.float32)
        row_sum = tl.zeros([ROWS], dtype=tl.float32)
        for program in tl.range(first_program, last_program + 1, num_stages=1):
            is_begun_here = item_begin >= _begin_of(program, total_tiles, num_programs)
            rows = (program * 2 + is_begun_here.to(tl.int32)) * ROWS + tl.arange(0, ROWS)
            part_max = tl.load(extrema_ptr + rows * 2, cache_modifier=".cg")
            part_sum = tl.load(extrema_ptr + rows * 2 + 1, cache_modifier=".cg")
            part = tl.load(state_ptr + rows[:, None] * HEAD_DIM + dims[None, :], cache_modifier=".cg")
            new_max = tl.maximum(row_max, part_max)
            safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
            old_weight = tl.exp2(row_max - safe_max)
            part_weight = tl.exp2(part_max - safe_max)
            accumulator = accumulator * old_weight[:, None] + part * part_weight[:, None]
            row_sum = row_sum * old_weight + part_sum * part_weight
            row_max = new_max
        _store_result(
            accumulator,
            row_max,
            row_sum,
            row_index,
            is_row,
            has_prefix,
            out_ptr,
            lse_ptr,
            prefix_out_ptr,
            prefix_lse_ptr,
            PART,
            HEAD_DIM,
        )


@triton.jit
def _block_of(block_table_ptr, block_table_stride, request, kv_token, is_wanted, BLOCK_SIZE: tl.constexpr):
    entry = request.to(tl.int64) * block_table_stride + kv_token // BLOCK_SIZE
    return tl.load(block_table_ptr + entry, mask=is_wanted, other=0)


@triton.jit
def _finite(v, IS_COMPILED: tl.constexpr):
    """Make NaN and infinities some finite number, without a mask.

    Beyond the context a block may hold NaN, and 0 * NaN is NaN. Unlike a mask, a clamp of the value needs no detour
    through shared memory on the way to the tensor cores. A request's own NaN still shows through q and k.
    """
    # min and max of PTX return the operand that is a number.
    if IS_COMPILED and v.dtype == tl.bfloat16:
        v = tl.inline_asm_elementwise(
            "{.reg .b32 high, low; mov.b32 high, 0x7F7F7F7F; mov.b32 low, 0xFF7FFF7F;"
            " min.bf16x2 $0, $1, high; max.bf16x2 $0, $0, low;}",
            "=r,r",
            [v],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    elif IS_COMPILED and v.dtype == tl.float16:
        v = tl.inline_asm_elementwise(
            "{.reg .b32 high, low; mov.b32 high, 0x7BFF7BFF; mov.b32 low, 0xFBFFFBFF;"
            " min.f16x2 $0, $1, high; max.f16x2 $0, $0, low;}",
            "=r,r",
            [v],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    elif v.dtype == tl.float16:
        v = tl.where(tl.abs(v) < 65504.0, v, 0.0)
    else:
        v = tl.where(tl.abs(v) < 3e38, v, 0.0)
    return v


@triton.jit
def _attend_to_tile(
    q,
    k,
    v,
    num_valid,
    scale_log2e,
    accumulator,
    row_max,
    row_sum,
    TILE: tl.constexpr,
    MAY_HOLD_NAN: tl.constexpr,
    IS_COMPILED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add one tile of keys and values, [TILE, HEAD_DIM], to the running softmax of the query rows."""
    is_valid = tl.arange(0, TILE) < num_valid
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2e
    scores = tl.where(is_valid[None, :], scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - safe_max[:, None])
    decay = tl.exp2(row_max - safe_max)
    if MAY_HOLD_NAN:
        v = _finite(v, IS_COMPILED)
    accumulator = tl.dot(weights.to(v.dtype), v, accumulator * decay[:, None], input_precision=PRECISION)
    return accumulator, new_max, row_sum * decay + tl.sum(weights, axis=1)


@triton.jit
def _tile_at(
    index,
    sequence,
    work_begins_ptr,
    num_sequences,
    num_kv_heads,
    context_lens_ptr,
    prefix_lens_ptr,
    group_starts_ptr,
    group_sizes_ptr,
    PART: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Return what stands at `index` of the list of work, which belongs to `sequence`.

    (first request, requests, first KV token, end of KV, tiles of the item, KV head, block of rows, tile within the item)
    """
    first_request, num_requests, kv_begin, kv_end, num_tiles = _load_sequence(
        sequence, num_sequences, context_lens_ptr, prefix_lens_ptr, group_starts_ptr, group_sizes_ptr, PART, TILE
    )
    position = index - tl.load(work_begins_ptr + sequence)
    item = position // num_tiles
    tile = position - item * num_tiles
    if PART == PREFIX:
        row_blocks = tl.maximum((num_requests * GROUP_SIZE + ROWS - 1) // ROWS, 1)
        kv_head = item // row_blocks
        row_block = item - kv_head * row_blocks
    else:
        kv_head = item
        row_block = item * 0
    return first_request, num_requests, kv_begin, kv_end, num_tiles, kv_head, row_block, tile


@triton.jit
def _list_tiles(
    begin,
    list_ptr,
    SEQUENCES_LOG2: tl.constexpr,
    work_begins_ptr,
    num_sequences,
    num_kv_heads,
    block_table_ptr,
    block_table_stride,
    context_lens_ptr,
    prefix_lens_ptr,
    group_starts_ptr,
    group_sizes_ptr,
    PART: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SEGMENT: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Write down the SEGMENT tiles from `begin` on, eight words each, so that the loop over them only reads.

    Words: row of the cache (USE_TMA) or KV token, first request, KV head, block of rows, keys that are valid, tile within
    the item, tiles behind it in the item, requests (PREFIX) or whether a prefix is to be merged (SUFFIX).
    """
    index = begin + tl.arange(0, SEGMENT)
    # The last sequence that begins at or before the index. Entries behind num_sequences repeat the total.
    sequence = tl.zeros([SEGMENT], dtype=tl.int32)
    for bit in tl.static_range(SEQUENCES_LOG2 - 1, -1, -1):
        candidate = sequence + (1 << bit)
        sequence = tl.where(tl.load(work_begins_ptr + candidate) <= index, candidate, sequence)
    first_request, num_requests, kv_begin, kv_end, num_tiles, kv_head, row_block, tile = _tile_at(
        index,
        sequence,
        work_begins_ptr,
        num_sequences,
        num_kv_heads,
        context_lens_ptr,
        prefix_lens_ptr,
        group_starts_ptr,
        group_sizes_ptr,
        PART,
        GROUP_SIZE,
        ROWS,
        TILE,
    )
    kv_token = kv_begin + tile * TILE
    place = kv_token
    if USE_TMA:
        is_real = (sequence < num_sequences) & (kv_token < kv_end)
        block = _block_of(block_table_ptr, block_table_stride, first_request, kv_token, is_real, BLOCK_SIZE)
        place = (block * num_kv_heads + kv_head) * BLOCK_SIZE + kv_token % BLOCK_SIZE
    entry = list_ptr + tl.arange(0, SEGMENT) * 8
    tl.store(entry, place)
    tl.store(entry + 1, first_request)
    tl.store(entry + 2, kv_head)
    tl.store(entry + 3, row_block)
    tl.store(entry + 4, kv_end - kv_token)
    tl.store(entry + 5, tile)
    tl.store(entry + 6, num_tiles - 1 - tile)
    if PART == PREFIX:
        tl.store(entry + 7, num_requests)
    else:
        tl.store(entry + 7, (kv_begin > 0).to(tl.int32))


@triton.jit
def _paged_attention_kernel(
    q_ptr,
    k_cache,
    v_cache,
    block_table_ptr,
    context_lens_ptr,
    prefix_lens_ptr,
    group_starts_ptr,
    group_sizes_ptr,
    out_ptr,
    lse_ptr,
    prefix_out_ptr,
    prefix_lse_ptr,
    state_ptr,
    extrema_ptr,
    work_begins_ptr,
    list_ptr,
    counters_ptr,
    num_sequences,
    num_kv_heads,
    q_stride,
    block_table_stride,
    scale_log2e,
    PART: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    SEQUENCES_LOG2: tl.constexpr,
    SEGMENT: tl.constexpr,
    USE_TMA: tl.constexpr,
    IS_COMPILED: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    # 1. The list of work: how long is it, and which part of it is this program's?
    all_sequences = tl.arange(0, 1 << SEQUENCES_LOG2)
    all_first, all_requests, all_kv_begins, all_kv_ends, all_tiles = _load_sequence(
        all_sequences, num_sequences, context_lens_ptr, prefix_lens_ptr, group_starts_ptr, group_sizes_ptr, PART, TILE
    )
    all_items = num_kv_heads * tl.maximum((all_requests * GROUP_SIZE + ROWS - 1) // ROWS, 1)
    all_work = tl.where(all_sequences < num_sequences, all_items * all_tiles, 0)
    all_ends = tl.cumsum(all_work)
    total_tiles = tl.sum(all_work)
    num_programs = tl.minimum(tl.num_programs(0), total_tiles)  # so that every part holds a tile
    program = tl.program_id(0)
    if program >= num_programs:
        return
    part_begin = _begin_of(program, total_tiles, num_programs)
    part_end = _begin_of(program + 1, total_tiles, num_programs)
    # Every program leaves the same numbers here and reads back its own.
    tl.store(work_begins_ptr + all_sequences + 1, all_ends)
    tl.store(work_begins_ptr, 0)
    tl.debug_barrier()
    first_sequence = tl.sum((all_ends <= part_begin).to(tl.int32))
    last_sequence = tl.sum((all_ends <= part_end - 1).to(tl.int32))
    num_heads = num_kv_heads * GROUP_SIZE
    dims = tl.arange(0, HEAD_DIM)

    # 2. The tiles, across items. The compiler lets loads run ahead where the loop's index alone says their addresses,
    # not where these follow from what an earlier iteration computed: so the list is written out.
    accumulator = tl.zeros([ROWS, HEAD_DIM], dtype=tl.float32)
    row_max = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([ROWS], dtype=tl.float32)
    list_ptr += program * SEGMENT * 8
    for segment_begin in tl.range(part_begin, part_end, SEGMENT, num_stages=1):
        tl.debug_barrier()  # nobody still reads the last segment's list
        _list_tiles(
            segment_begin,
            list_ptr,
            SEQUENCES_LOG2,
            work_begins_ptr,
            num_sequences,
            num_kv_heads,
            block_table_ptr,
            block_table_stride,
            context_lens_ptr,
            prefix_lens_ptr,
            group_starts_ptr,
            group_sizes_ptr,
            PART,
            GROUP_SIZE,
            ROWS,
            BLOCK_SIZE,
            TILE,
            SEGMENT,
            USE_TMA,
        )
        tl.debug_barrier()
        segment_tiles = tl.minimum(part_end - segment_begin, SEGMENT)
        for number in tl.range(0, segment_tiles, num_stages=NUM_STAGES):
            entry = list_ptr + number * 8
            place = tl.load(entry)
            first_request = tl.load(entry + 1)
            kv_head = tl.load(entry + 2)
            num_valid = tl.load(entry + 4)
            tile = tl.load(entry + 5)
            if PART == PREFIX:
                row_block = tl.load(entry + 3)
                num_requests = tl.load(entry + 7)
            else:
                row_block = 0
                num_requests = 1
            row = row_block * ROWS + tl.arange(0, ROWS)
            is_row = row < num_requests * GROUP_SIZE
            q_begin = first_request.to(tl.int64) * q_stride + kv_head * GROUP_SIZE * HEAD_DIM
            q_offsets = (row // GROUP_SIZE) * q_stride + (row % GROUP_SIZE) * HEAD_DIM
            q = tl.load(q_ptr + q_begin + q_offsets[:, None] + dims[None, :], mask=is_row[:, None], other=0.0)
            if USE_TMA:
                k = k_cache.load([place, 0])
                v = v_cache.load([place, 0])
            else:
                offsets = tl.arange(0, TILE)
                is_token = offsets < num_valid
                tokens = place + offsets
                blocks = _block_of(block_table_ptr, block_table_stride, first_request, tokens, is_token, BLOCK_SIZE)
                cache_rows = (blocks.to(tl.int64) * num_kv_heads + kv_head) * BLOCK_SIZE + tokens % BLOCK_SIZE
                cache_offsets = cache_rows[:, None] * HEAD_DIM + dims[None, :]
                k = tl.load(k_cache + cache_offsets, mask=is_token[:, None], other=0.0)
                v = tl.load(v_cache + cache_offsets, mask=is_token[:, None], other=0.0)

            is_item_begin = tile == 0
            accumulator = tl.where(is_item_begin, 0.0, accumulator)
            row_max = tl.where(is_item_begin, float("-inf"), row_max)
            row_sum = tl.where(is_item_begin, 0.0, row_sum)
            # Masked loads fill up with zeros, and a prefix ends with a block: only a descriptor's tile reaches beyond.
            accumulator, row_max, row_sum = _attend_to_tile(
                q,
                k,
                v,
                num_valid,
                scale_log2e,
                accumulator,
                row_max,
                row_sum,
                TILE,
                USE_TMA and PART != PREFIX,
                IS_COMPILED,
                PRECISION,
            )
            if tl.load(entry + 6) == 0:
                is_whole = segment_begin + number - tile >= part_begin
                has_prefix = tl.load(entry + 7) > 0
                rows, is_row = _row_offsets(
                    first_request, num_requests, kv_head, row_block, num_heads, GROUP_SIZE, ROWS
                )
                _store_result(
                    accumulator,
                    row_max,
                    row_sum,
                    rows,
                    is_row & is_whole,
                    has_prefix,
                    out_ptr,
                    lse_ptr,
                    prefix_out_ptr,
                    prefix_lse_ptr,
                    PART,
                    HEAD_DIM,
                )
                _store_state(
                    accumulator, row_max, row_sum, program * 2, is_whole == 0, state_ptr, extrema_ptr, ROWS, HEAD_DIM
                )

    # 3. Items that other programs share: the first of this part (begun earlier) and the last (ended later).
    first_request, num_requests, kv_begin, kv_end, num_tiles, kv_head, row_block, tile = _tile_at(
        part_end - 1,
        last_sequence,
        work_begins_ptr,
        num_sequences,
        num_kv_heads,
        context_lens_ptr,
        prefix_lens_ptr,
        group_starts_ptr,
        group_sizes_ptr,
        PART,
        GROUP_SIZE,
        ROWS,
        TILE,
    )
    tail_begin = part_end - 1 - tile
    is_tail_cut = tile + 1 < num_tiles
    if is_tail_cut:
        slot = program * 2 + (tail_begin >= part_begin).to(tl.int32)
        _store_state(accumulator, row_max, row_sum, slot, True, state_ptr, extrema_ptr, ROWS, HEAD_DIM)
    tl.debug_barrier()  # all threads' states are written before one thread announces them
    if is_tail_cut:
        rows, is_row = _row_offsets(first_request, num_requests, kv_head, row_block, num_heads, GROUP_SIZE, ROWS)
        _arrive_and_merge(
            tail_begin,
            num_tiles,
            total_tiles,
            num_programs,
            rows,
            is_row,
            kv_begin > 0,
            counters_ptr,
            state_ptr,
            extrema_ptr,
            out_ptr,
            lse_ptr,
            prefix_out_ptr,
            prefix_lse_ptr,
            PART,
            ROWS,
            HEAD_DIM,
        )
    first_request, num_requests, kv_begin, kv_end, num_tiles, kv_head, row_block, tile = _tile_at(
        part_begin,
        first_sequence,
        work_begins_ptr,
        num_sequences,
        num_kv_heads,
        context_lens_ptr,
        prefix_lens_ptr,
        group_starts_ptr,
        group_sizes_ptr,
        PART,
        GROUP_SIZE,
        ROWS,
        TILE,
    )
    head_begin = part_begin - tile
    is_same_item = is_tail_cut & (head_begin == tail_begin)
    if (tile > 0) & (is_same_item == 0):
        rows, is_row = _row_offsets(first_request, num_requests, kv_head, row_block, num_heads, GROUP_SIZE, ROWS)
        _arrive_and_merge(
            head_begin,
            num_tiles,
            total_tiles,
            num_programs,
            rows,
            is_row,
            kv_begin > 0,
            counters_ptr,
            state_ptr,
            extrema_ptr,
            out_ptr,
            lse_ptr,
            prefix_out_ptr,
            prefix_lse_ptr,
            PART,
            ROWS,
            HEAD_DIM,
        )


@dataclass(frozen=True, slots=True)
class LaunchShape:
    """How a launch cuts its work: chosen by `choose_launch_shape`, or by a benchmark that tries others."""

    use_tma: bool  # load K and V tiles through tensor descriptors; a tile must lie within a block
    tile: int  # keys a tile
    num_stages: int
    num_warps: int
    num_programs: int


@lru_cache(maxsize=16)
def device_limits(device: torch.device) -> tuple[int, int, bool]:
    """Return (SMs, shared memory in bytes that a program may take, whether tensor descriptors work) of a device."""
    if device.type != "cuda":  # the interpreter
        return _INTERPRETED_PROGRAMS, 227 * 1024, True
    properties = torch.cuda.get_device_properties(device)
    shared_memory = int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined] # stub lacks it
    return properties.multi_processor_count, shared_memory, properties.major >= 9


def choose_launch_shape(
    k_cache: torch.Tensor,
    rows: int,
    num_programs: int | None = None,
    use_tma: bool | None = None,
    is_prefix: bool = False,
) -> LaunchShape:
    """Choose tile, stages and warps for a cache: as many bytes in flight as shared memory holds."""
    num_sms, shared_memory, has_tma = device_limits(k_cache.device)
    num_blocks, num_kv_heads, block_size, head_dim = k_cache.shape
    key_bytes = head_dim * k_cache.element_size()
    widest_tile = max(16, 32768 // key_bytes)
    tile = min(128, block_size, widest_tile)
    can_use_tma = (
        has_tma
        and tile >= 16
        and tile & (tile - 1) == 0
        and block_size % tile == 0
        and num_blocks * num_kv_heads * block_size < 2**31  # descriptors index rows with 32 bits
    )
    if use_tma is None:
        use_tma = can_use_tma and tile >= 64
    if use_tma and not can_use_tma:
        raise ValueError(f"Invalid shape of k_cache: tensor descriptors can't tile {list(k_cache.shape)}")
    if not use_tma:
        tile = min(64, widest_tile)
    # Loads of loads take two stages for each tile in flight: work list or block table, then the tile.
    bytes_in_flight = (2 * tile + rows) * key_bytes
    depth = max(1, min(4, (shared_memory - 4 * rows * head_dim - 2048) // bytes_in_flight))
    num_stages = 2 * depth - 1 if is_prefix else 2 * depth + 1 if use_tma else 2 * depth + 2
    return LaunchShape(use_tma, tile, num_stages, 4 if use_tma else 8, num_programs or num_sms)


def _arrival_counters_of(device: torch.device) -> torch.Tensor:
    """Return the zeroed counters of the current stream; the kernel leaves them zeroed. They live as long as the process.

    Launches that may run at the same time need counters of their own, hence one set per stream.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if (device, stream) not in _arrival_counters:
        _arrival_counters[device, stream] = torch.zeros(_MAX_PROGRAMS, dtype=torch.int32, device=device)
    return _arrival_counters[device, stream]


def launch_paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    *,
    part: tl.constexpr,
    out: torch.Tensor,
    shape: LaunchShape,
    rows: int,
    prefix_lens: torch.Tensor | None = None,
    groups: tuple[torch.Tensor, torch.Tensor] | None = None,
    prefix_result: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Run the kernel for one part and write `out`.

    groups: (group_starts, group_sizes), the sequences of a PREFIX part. prefix_result: (out float32 [B, num_heads, D],
    lse float32 [B, num_heads], base 2), written by a PREFIX part (which has it as `out`) and read by a SUFFIX part.
    """
    num_kv_heads, block_size, head_dim = k_cache.shape[1:]
    if head_dim not in (16, 32, 64, 128, 256):
        raise ValueError(f"Invalid shape of k_cache: expected head_dim 16, 32, 64, 128 or 256, got {head_dim}")
    if not 1 <= shape.num_programs <= _MAX_PROGRAMS:
        raise ValueError(f"Invalid num_programs: expected 1 to {_MAX_PROGRAMS}, got {shape.num_programs}")
    num_sequences = q.shape[0] if groups is None else groups[0].shape[0]
    group_starts, group_sizes = groups or (context_lens, context_lens)
    prefix_out, prefix_lse = prefix_result or (out, out)
    num_slots = 2 * shape.num_programs
    state = torch.empty(num_slots * rows, head_dim, dtype=torch.float32, device=q.device)
    extrema = torch.empty(num_slots * rows, 2, dtype=torch.float32, device=q.device)
    sequences_log2 = max(4, (num_sequences - 1).bit_length())
    work_begins = torch.empty((1 << sequences_log2) + 1, dtype=torch.int32, device=q.device)
    tile_list = torch.empty(shape.num_programs, _SEGMENT, 8, dtype=torch.int32, device=q.device)
    caches: list[object] = [k_cache, v_cache]
    if shape.use_tma:
        caches = [
            TensorDescriptor.from_tensor(c.view(-1, head_dim), [shape.tile, head_dim]) for c in (k_cache, v_cache)
        ]
    _paged_attention_kernel[(shape.num_programs,)](
        q,
        *caches,
        block_table,
        context_lens,
        context_lens if prefix_lens is None else prefix_lens,
        group_starts,
        group_sizes,
        out,
        prefix_lse,
        prefix_out,
        prefix_lse,
        state,
        extrema,
        work_begins,
        tile_list,
        _arrival_counters_of(q.device),
        num_sequences,
        num_kv_heads,
        q.stride(0),
        block_table.stride(0),
        scale / math.log(2),
        PART=part,
        GROUP_SIZE=q.shape[1] // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        TILE=shape.tile,
        ROWS=rows,
        SEQUENCES_LOG2=sequences_log2,
        SEGMENT=_SEGMENT,
        USE_TMA=shape.use_tma,
        IS_COMPILED=q.is_cuda,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        NUM_STAGES=shape.num_stages,
        num_warps=shape.num_warps,
    )


def rows_of_group(num_heads: int, num_kv_heads: int) -> int:
    """Return the rows of a query tile that holds the heads of one request over one KV head; tensor cores take 16."""
    return max(16, int(triton.next_power_of_2(num_heads // num_kv_heads)))


def decode_attention_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    num_programs: int | None = None,
    shape: LaunchShape | None = None,
) -> torch.Tensor:
    """Launch `decode_attention.decode_attention`; arguments as there, unchecked. No host sync: safe to capture."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    rows = rows_of_group(q.shape[1], k_cache.shape[1])
    shape = shape or choose_launch_shape(k_cache, rows, num_programs)
    launch_paged_attention(
        q, k_cache, v_cache, block_table, context_lens, scale, part=PLAIN, out=out, shape=shape, rows=rows
    )
    return out
