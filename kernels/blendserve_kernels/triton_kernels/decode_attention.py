"""Triton decode attention over the paged cache: persistent, split over KV, for plain, prefix and suffix parts alike.

A plan lists the KV tiles of all sequences, item by item (one sequence, one block of query rows); it depends on the
context lengths and block tables alone, so the layers of a step share it. The work is that list once per KV head. Each
of P programs takes an equal contiguous part of it, whatever the context lengths, so P can be any number of SMs. An item
that lies within one part is finished by its program. One that is cut leaves its state (accumulator, maximum, sum) per
program, and the last program to arrive merges the states in order.

A sequence is a request with its own KV (plain), a request's KV behind a shared prefix (suffix, merged with the prefix
part's result at the end), or a group of requests over the prefix that they share (prefix).
"""

# Kernel parameters are typed by Triton, constexprs are capitals by its custom.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803, N806, SIM108

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

PLAIN_PART, SUFFIX_PART, PREFIX_PART = 0, 1, 2
_SUFFIX, _PREFIX = tl.constexpr(SUFFIX_PART), tl.constexpr(PREFIX_PART)

# A tile's entry in a plan, int32 words: its place (row of the cache for descriptors, else KV token), the first query
# row (request * GROUP_SIZE + head of the group), flags, where its item begins in the list, tiles of the item, request.
_ENTRY_WORDS = 8
_FLAG_FIRST = tl.constexpr(1 << 9)  # below: how many keys of the tile are valid
_FLAG_LAST = tl.constexpr(1 << 10)
_FLAG_PREFIX = tl.constexpr(1 << 11)
_SHIFT_ROWS = tl.constexpr(12)  # above: how many query rows are real

# On Hopper:
KEEP_WHOLE = True  # leave a few programs without work where that saves the cutting of all items
# Programmatic dependent launch: set up while the kernel before ends (another layer's, or rotary embedding), then wait.
BEGIN_EARLY = True
_MAX_PROGRAMS = 1024
_INTERPRETED_PROGRAMS = 5  # without a GPU: few, and no divisor of common sizes, so that items are cut


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
    if PART == _PREFIX:
        first_request = tl.load(group_starts_ptr + sequence, mask=is_real, other=0)
        num_requests = tl.load(group_sizes_ptr + sequence, mask=is_real, other=0)
        kv_begin = first_request * 0
        kv_end = tl.load(prefix_lens_ptr + first_request, mask=is_real & (num_requests > 0), other=0)
    else:
        first_request = sequence
        num_requests = is_real.to(tl.int32)
        kv_end = tl.load(context_lens_ptr + sequence, mask=is_real, other=0)
        if PART == _SUFFIX:
            kv_begin = tl.load(prefix_lens_ptr + sequence, mask=is_real, other=0)
        else:
            kv_begin = kv_end * 0
    num_tiles = tl.maximum((kv_end - kv_begin + TILE - 1) // TILE, 1)  # an empty context still owes its zeros
    return first_request, num_requests, kv_begin, kv_end, num_tiles


@triton.jit
def _part_begin(program, total_tiles, num_programs):
    """Return where the part of a program begins: the first total % P parts are longer by one."""
    return program * (total_tiles // num_programs) + tl.minimum(program, total_tiles % num_programs)


@triton.jit
def _tile_entry(
    tile,
    is_tile,
    num_tiles,
    kv_begin,
    kv_end,
    first_request,
    num_rows,
    has_prefix,
    block_table_ptr,
    num_kv_heads,
    block_table_stride,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Return place and flags, words 0 and 2, of a vector of tiles of one item."""
    kv_token = kv_begin + tile * TILE
    num_valid = tl.maximum(tl.minimum(kv_end - kv_token, TILE), 0)
    place = kv_token
    if USE_TMA:
        entry = first_request.to(tl.int64) * block_table_stride + kv_token // BLOCK_SIZE
        block = tl.load(block_table_ptr + entry, mask=is_tile & (num_valid > 0), other=0)
        place = block * num_kv_heads * BLOCK_SIZE + kv_token % BLOCK_SIZE
    flags = num_valid + has_prefix * _FLAG_PREFIX + (num_rows << _SHIFT_ROWS)
    flags += tl.where(tile == 0, _FLAG_FIRST, 0) + tl.where(tile == num_tiles - 1, _FLAG_LAST, 0)
    return place, flags


@triton.jit
def _describe_parts(
    list_length,
    longest,
    position,
    num_tiles,
    kv_begin,
    kv_end,
    first_request,
    num_rows,
    has_prefix,
    block_table_ptr,
    list_length_ptr,
    parts_ptr,
    num_sequences,
    num_kv_heads,
    block_table_stride,
    GROUP_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    USE_TMA: tl.constexpr,
    PADDED_PARTS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    KEEP_WHOLE: tl.constexpr,
):
    """Say where parts begin and end whose last item is this sequence's, so that one load tells a warp where to begin.

    A part begins with its last item: the items that other parts share are thus done first, and their merging hides
    behind the rest.
    """
    total_tiles = list_length * num_kv_heads
    num_parts = tl.minimum(NUM_PARTS, total_tiles)  # so that every part holds a tile
    if KEEP_WHOLE:
        # Items of one length are not cut where parts of whole items are nearly as many.
        size = ((total_tiles + num_parts - 1) // num_parts + longest - 1) // longest * longest
        fewer = (total_tiles + size - 1) // size
        is_better = (longest * num_sequences == list_length) & (fewer * 16 >= num_parts * 15)
        num_parts = tl.where(is_better, fewer, num_parts)
    is_first_sequence = tl.program_id(0) == 0
    tl.store(list_length_ptr + 1, num_parts, mask=is_first_sequence)
    part = tl.arange(0, PADDED_PARTS)
    is_part = part < num_parts
    begin = tl.where(is_part, _part_begin(part, total_tiles, num_parts), 0)
    end = tl.where(is_part, _part_begin(part + 1, total_tiles, num_parts), 0)
    last = tl.maximum(end - 1, 0)
    last_tile = last % list_length - position
    is_mine = is_part & (last_tile >= 0) & (last_tile < num_tiles)
    tail = tl.maximum(last - last_tile, begin)
    place, flags = _tile_entry(
        last_tile - (last - tail),
        is_mine,
        num_tiles,
        kv_begin,
        kv_end,
        first_request,
        num_rows,
        has_prefix,
        block_table_ptr,
        num_kv_heads,
        block_table_stride,
        BLOCK_SIZE,
        TILE,
        USE_TMA,
    )
    words = parts_ptr + part * 8
    is_written = is_mine | (is_first_sequence & (part < NUM_PARTS) & (is_part == 0))
    tl.store(words, begin, mask=is_written)
    tl.store(words + 1, end, mask=is_written)
    tl.store(words + 2, tail, mask=is_written)
    tl.store(words + 3, place, mask=is_written)
    tl.store(words + 4, first_request * GROUP_SIZE + part * 0, mask=is_written)
    tl.store(words + 5, flags, mask=is_written)
    tl.store(words + 6, position + part * 0, mask=is_written)


@triton.jit
def _plan_kernel(
    block_table_ptr,
    context_lens_ptr,
    prefix_lens_ptr,
    group_starts_ptr,
    group_sizes_ptr,
    list_length_ptr,
    list_ptr,
    parts_ptr,
    counters_ptr,
    num_sequences,
    num_kv_heads,
    block_table_stride,
    PART: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED_SEQUENCES: tl.constexpr,
    USE_TMA: tl.constexpr,
    CHUNK: tl.constexpr,
    PADDED_PROGRAMS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    KEEP_WHOLE: tl.constexpr,
):
    """List the tiles of one sequence per program, behind those of the sequences before it; zero the counters.

    NUM_PARTS: how many parts to describe, for the kernel for Hopper, each by the sequence whose tile comes first in it.
    """
    this_sequence = tl.program_id(0)
    tl.store(counters_ptr + tl.arange(0, PADDED_PROGRAMS), 0, mask=this_sequence == 0)
    all_sequences = tl.arange(0, PADDED_SEQUENCES)
    _first, all_requests, _begin, _end, all_tiles = _load_sequence(
        all_sequences, num_sequences, context_lens_ptr, prefix_lens_ptr, group_starts_ptr, group_sizes_ptr, PART, TILE
    )
    all_row_blocks = tl.maximum((all_requests * GROUP_SIZE + ROWS - 1) // ROWS, 1)
    all_entries = tl.where(all_sequences < num_sequences, all_row_blocks * all_tiles, 0)
    list_length = tl.sum(all_entries)
    tl.store(list_length_ptr, list_length, mask=this_sequence == 0)
    position = tl.sum(tl.where(all_sequences < this_sequence, all_entries, 0))
    first_request, num_requests, kv_begin, kv_end, num_tiles = _load_sequence(
        this_sequence, num_sequences, context_lens_ptr, prefix_lens_ptr, group_starts_ptr, group_sizes_ptr, PART, TILE
    )
    has_prefix = 0
    if PART == _SUFFIX:
        has_prefix = (kv_begin > 0).to(tl.int32)
    num_rows = num_requests * GROUP_SIZE
    if NUM_PARTS > 0:
        _describe_parts(
            list_length,
            tl.max(all_tiles),
            position,
            num_tiles,
            kv_begin,
            kv_end,
            first_request,
            num_rows,
            has_prefix,
            block_table_ptr,
            list_length_ptr,
            parts_ptr,
            num_sequences,
            num_kv_heads,
            block_table_stride,
            GROUP_SIZE,
            BLOCK_SIZE,
            TILE,
            USE_TMA,
            PADDED_PROGRAMS,
            NUM_PARTS,
            KEEP_WHOLE,
        )
    for row_begin in tl.range(0, tl.maximum(num_rows, 1), ROWS):
        rows_here = tl.minimum(num_rows - row_begin, ROWS)
        for chunk_begin in tl.range(0, num_tiles, CHUNK):
            tile = chunk_begin + tl.arange(0, CHUNK)
            is_tile = tile < num_tiles
            place, flags = _tile_entry(
                tile,
                is_tile,
                num_tiles,
                kv_begin,
                kv_end,
                first_request,
                rows_here,
                has_prefix,
                block_table_ptr,
                num_kv_heads,
                block_table_stride,
                BLOCK_SIZE,
                TILE,
                USE_TMA,
            )
            words = list_ptr + (position + tile) * 8
            tl.store(words, place, mask=is_tile)
            tl.store(words + 1, first_request * GROUP_SIZE + row_begin + tile * 0, mask=is_tile)
            tl.store(words + 2, flags, mask=is_tile)
            tl.store(words + 3, position + tile * 0, mask=is_tile)
            tl.store(words + 4, num_tiles + tile * 0, mask=is_tile)
            tl.store(words + 5, first_request + tile * 0, mask=is_tile)
        position += num_tiles


@triton.jit
def _program_of(index, total_tiles, num_programs):
    """Return the program whose part holds `index`."""
    short = total_tiles // num_programs
    num_long = total_tiles % num_programs
    end_of_long = num_long * (short + 1)
    return tl.where(index < end_of_long, index // (short + 1), num_long + (index - end_of_long) // short)


@triton.jit
def _query_rows(first_row, num_rows, kv_head, num_heads, GROUP_SIZE: tl.constexpr, ROWS: tl.constexpr):
    """Return request * num_heads + head of each row of a query block, int64 [ROWS], and which rows are real."""
    number = tl.arange(0, ROWS)
    row = first_row + number
    index = (row // GROUP_SIZE).to(tl.int64) * num_heads + kv_head * GROUP_SIZE + row % GROUP_SIZE
    return index, number < num_rows


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
    if PART == _SUFFIX:
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
    if PART == _PREFIX:
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
def _merge_states(
    item_begin,
    first_program,
    last_program,
    total_tiles,
    num_programs,
    state_ptr,
    extrema_ptr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Merge the states that programs left of an item, in the order of the programs."""
    dims = tl.arange(0, HEAD_DIM)
    accumulator = tl.zeros([ROWS, HEAD_DIM], dtype=tl.float32)
    row_max = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([ROWS], dtype=tl.float32)
    for program in tl.range(first_program, last_program + 1):
        is_begun_here = item_begin >= _part_begin(program, total_tiles, num_programs)
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
    return accumulator, row_max, row_sum


@triton.jit
def _attend_to_tile(
    q,
    k,
    v,
    num_valid,
    scale_log2e,
    accumulator,
    row_max,
    weight_sums,
    TILE: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,
    MAY_HOLD_NAN: tl.constexpr,
    IS_COMPILED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add one tile of keys and values, [TILE, HEAD_DIM], to the running softmax of the query rows.

    The sums of the weights may stay apart by key column, [ROWS, TILE], until the item ends: one reduction less a tile.
    """
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
    if SUM_COLUMNS == 1:
        weights = tl.sum(weights, axis=1)[:, None]
    return accumulator, new_max, weight_sums * decay[:, None] + weights


@triton.jit
def _paged_attention_kernel(
    q_ptr,
    k_cache,
    v_cache,
    block_table_ptr,
    list_length_ptr,
    list_ptr,
    out_ptr,
    lse_ptr,
    prefix_out_ptr,
    prefix_lse_ptr,
    state_ptr,
    extrema_ptr,
    counters_ptr,
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
    USE_TMA: tl.constexpr,
    IS_COMPILED: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    # 1. Which part of the work is this program's?
    list_length = tl.load(list_length_ptr)
    total_tiles = list_length * num_kv_heads
    num_programs = tl.minimum(tl.num_programs(0), total_tiles)  # so that every part holds a tile
    program = tl.program_id(0)
    if program >= num_programs:
        return
    part_begin = _part_begin(program, total_tiles, num_programs)
    part_end = _part_begin(program + 1, total_tiles, num_programs)
    num_heads = num_kv_heads * GROUP_SIZE
    dims = tl.arange(0, HEAD_DIM)

    # 2. The tiles, across items. Within the inner loop all addresses follow from the list, so loads can run ahead.
    accumulator = tl.zeros([ROWS, HEAD_DIM], dtype=tl.float32)
    row_max = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    SUM_COLUMNS: tl.constexpr = TILE if ROWS <= 32 else 1  # large blocks have no registers to spare
    weight_sums = tl.zeros([ROWS, SUM_COLUMNS], dtype=tl.float32)
    for kv_head in tl.range(part_begin // list_length, (part_end - 1) // list_length + 1, num_stages=1):
        head_begin = kv_head * list_length
        first_entry = tl.maximum(part_begin - head_begin, 0)
        end_entry = tl.minimum(part_end - head_begin, list_length)
        for entry in tl.range(first_entry, end_entry, num_stages=NUM_STAGES):
            words = list_ptr + entry * 8
            place = tl.load(words)
            first_row = tl.load(words + 1)
            flags = tl.load(words + 2)
            num_valid = flags & (_FLAG_FIRST - 1)
            row = first_row + tl.arange(0, ROWS)
            q_offsets = (row // GROUP_SIZE).to(tl.int64) * q_stride + (
                kv_head * GROUP_SIZE + row % GROUP_SIZE
            ) * HEAD_DIM
            is_row = tl.arange(0, ROWS) < (flags >> _SHIFT_ROWS)
            q = tl.load(q_ptr + q_offsets[:, None] + dims[None, :], mask=is_row[:, None], other=0.0)
            if USE_TMA:
                k = k_cache.load([place + kv_head * BLOCK_SIZE, 0])
                v = v_cache.load([place + kv_head * BLOCK_SIZE, 0])
            else:
                offsets = tl.arange(0, TILE)
                is_token = offsets < num_valid
                tokens = place + offsets
                table_row = block_table_ptr + tl.load(words + 5).to(tl.int64) * block_table_stride
                blocks = tl.load(table_row + tokens // BLOCK_SIZE, mask=is_token, other=0).to(tl.int64)
                cache_rows = (blocks * num_kv_heads + kv_head) * BLOCK_SIZE + tokens % BLOCK_SIZE
                cache_offsets = cache_rows[:, None] * HEAD_DIM + dims[None, :]
                k = tl.load(k_cache + cache_offsets, mask=is_token[:, None], other=0.0)
                v = tl.load(v_cache + cache_offsets, mask=is_token[:, None], other=0.0)

            is_first = (flags & _FLAG_FIRST) != 0
            accumulator = tl.where(is_first, 0.0, accumulator)
            row_max = tl.where(is_first, float("-inf"), row_max)
            weight_sums = tl.where(is_first, 0.0, weight_sums)
            # Masked loads fill up with zeros, and a prefix ends with a block: only a descriptor's tile reaches beyond.
            accumulator, row_max, weight_sums = _attend_to_tile(
                q,
                k,
                v,
                num_valid,
                scale_log2e,
                accumulator,
                row_max,
                weight_sums,
                TILE,
                SUM_COLUMNS,
                USE_TMA and PART != _PREFIX,
                IS_COMPILED,
                PRECISION,
            )
            if (flags & _FLAG_LAST) != 0:
                is_whole = head_begin + tl.load(words + 3) >= part_begin
                rows, is_row = _query_rows(first_row, flags >> _SHIFT_ROWS, kv_head, num_heads, GROUP_SIZE, ROWS)
                row_sum = tl.sum(weight_sums, axis=1)
                _store_result(
                    accumulator,
                    row_max,
                    row_sum,
                    rows,
                    is_row & is_whole,
                    (flags & _FLAG_PREFIX) != 0,
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

    # 3. Items that other programs share: number 0 begun before this part, number 1 ending behind it.
    head_kv_head = part_begin // list_length
    head_words = list_ptr + (part_begin - head_kv_head * list_length) * 8
    head_begin = head_kv_head * list_length + tl.load(head_words + 3)
    head_end = head_begin + tl.load(head_words + 4)
    tail_kv_head = (part_end - 1) // list_length
    tail_words = list_ptr + (part_end - 1 - tail_kv_head * list_length) * 8
    tail_begin = tail_kv_head * list_length + tl.load(tail_words + 3)
    tail_end = tail_begin + tl.load(tail_words + 4)
    is_tail_cut = tail_end > part_end
    is_head_cut = (head_begin < part_begin) & ((is_tail_cut == 0) | (head_begin != tail_begin))
    if is_tail_cut:
        slot = program * 2 + (tail_begin >= part_begin).to(tl.int32)
        row_sum = tl.sum(weight_sums, axis=1)
        _store_state(accumulator, row_max, row_sum, slot, True, state_ptr, extrema_ptr, ROWS, HEAD_DIM)
    if is_head_cut | is_tail_cut:
        number = tl.arange(0, 2)
        is_cut = ((number == 0) & is_head_cut) | ((number == 1) & is_tail_cut)
        item_begin = tl.where(number == 0, head_begin, tail_begin)
        item_end = tl.where(number == 0, head_end, tail_end)
        first_program = _program_of(item_begin, total_tiles, num_programs)
        last_program = _program_of(item_end - 1, total_tiles, num_programs)
        tl.debug_barrier()  # all threads' states are written before they are announced
        num_arrived = tl.atomic_add(counters_ptr + first_program, 1, mask=is_cut, sem="acq_rel", scope="gpu")
        tl.debug_barrier()
        is_merged = is_cut & (num_arrived == last_program - first_program)
        tl.store(counters_ptr + first_program, 0, mask=is_merged)  # ready for the next launch
        for item in tl.static_range(2):
            is_this = is_merged & (number == item)
            if tl.sum(is_this.to(tl.int32)) > 0:
                words = head_words if item == 0 else tail_words
                kv_head = head_kv_head if item == 0 else tail_kv_head
                flags = tl.load(words + 2)
                merged, merged_max, merged_sum = _merge_states(
                    head_begin if item == 0 else tail_begin,
                    tl.sum(tl.where(is_this, first_program, 0)),
                    tl.sum(tl.where(is_this, last_program, 0)),
                    total_tiles,
                    num_programs,
                    state_ptr,
                    extrema_ptr,
                    ROWS,
                    HEAD_DIM,
                )
                rows, is_row = _query_rows(
                    tl.load(words + 1), flags >> _SHIFT_ROWS, kv_head, num_heads, GROUP_SIZE, ROWS
                )
                _store_result(
                    merged,
                    merged_max,
                    merged_sum,
                    rows,
                    is_row,
                    (flags & _FLAG_PREFIX) != 0,
                    out_ptr,
                    lse_ptr,
                    prefix_out_ptr,
                    prefix_lse_ptr,
                    PART,
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
    is_for_hopper: bool = False  # run the kernel of gluon_kernels, which has stages and warps of its own


@lru_cache(maxsize=16)
def device_limits(device: torch.device) -> tuple[int, int, bool]:
    """Return (SMs, shared memory in bytes that a program may take, whether tensor descriptors work) of a device."""
    if device.type != "cuda":  # the interpreter
        return _INTERPRETED_PROGRAMS, 227 * 1024, True
    properties = torch.cuda.get_device_properties(device)
    shared_memory = int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined] # stub lacks it
    return properties.multi_processor_count, shared_memory, properties.major >= 9


@lru_cache(maxsize=16)
def is_hopper(device: torch.device) -> bool:
    """Return whether a device runs the kernels of `gluon_kernels`."""
    return device.type == "cuda" and torch.cuda.get_device_properties(device).major == 9


def check_head_dim(head_dim: int) -> None:
    """Raise ValueError unless the attention kernels have tiles for heads of this size."""
    if head_dim not in (16, 32, 64, 128, 256):
        raise ValueError(f"Invalid shape of k_cache: expected head_dim 16, 32, 64, 128 or 256, got {head_dim}")


def choose_launch_shape(
    k_cache: torch.Tensor,
    rows: int,
    num_programs: int | None = None,
    use_tma: bool | None = None,
) -> LaunchShape:
    """Choose tile, stages and warps for a cache: as many bytes in flight as shared memory holds."""
    check_head_dim(k_cache.shape[3])
    if num_programs is not None and not 1 <= num_programs <= _MAX_PROGRAMS:
        raise ValueError(f"Invalid num_programs: expected 1 to {_MAX_PROGRAMS}, got {num_programs}")
    num_sms, shared_memory, has_tma = device_limits(k_cache.device)
    num_blocks, num_kv_heads, block_size, head_dim = k_cache.shape
    key_bytes = head_dim * k_cache.element_size()
    is_wide = rows >= 64 and k_cache.element_size() == 2  # wide enough for a warp group's matrix instruction
    widest_tile = max(16, 16384 // key_bytes if is_wide else 32768 // key_bytes)
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
    # As many tiles in flight as shared memory holds. Loads of loads take two stages for each (the list, then the tile),
    # three with a block table between; the warp group's instruction reads shared memory itself and keeps one tile more.
    tile_bytes = (2 * tile + rows) * key_bytes
    most = 2 if use_tma and not is_wide else 3  # two of 64 KiB are enough, a third only makes the start longer
    tiles_in_flight = max(1, min(most, (shared_memory - 4 * rows * head_dim - 4096) // tile_bytes))
    num_stages = (2 if use_tma else 3) * tiles_in_flight + (-1 if is_wide else 1)
    num_warps = 4 if is_wide and use_tma else 8
    return LaunchShape(use_tma, tile, num_stages, num_warps, num_programs or num_sms)


def choose_decode_shape(k_cache: torch.Tensor, group_size: int, num_programs: int | None = None) -> LaunchShape:
    """Choose how to launch plain or suffix decode over a cache: on Hopper by its own kernel where that fits."""
    shape = choose_launch_shape(k_cache, rows_of_group(group_size), num_programs)
    num_blocks, num_kv_heads, block_size, head_dim = k_cache.shape
    if not (
        is_hopper(k_cache.device)
        and k_cache.element_size() == 2
        and head_dim in (64, 128)
        and group_size <= 8
        and block_size % 64 == 0
        and num_blocks * num_kv_heads * block_size < 2**31
    ):
        return shape
    return replace(shape, tile=64, is_for_hopper=True)


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """The list of KV tiles of one part, made by `make_plan`, and how to launch over it.

    Valid for the block table, context lengths and cache shape that it was made from, whatever the layer. Launches that
    share a plan must follow one another, on one stream: the counters are theirs in turn.
    """

    part: int
    rows: int
    shape: LaunchShape
    tile_list: torch.Tensor  # int32 [max_entries, 8]
    list_length: torch.Tensor  # int32 [2], entries and parts that hold any, on the device: no host knows them
    # int32 [num_parts, 8], for the kernel for Hopper: begin and end of a part, the tile that comes first in it, and of
    # that tile words 0, 1, 2 and 3
    parts: torch.Tensor
    counters: torch.Tensor  # int32, programs that have arrived at a cut item; zero between launches


def make_plan(
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    group_size: int,
    *,
    part: int,
    rows: int,
    shape: LaunchShape,
    prefix_lens: torch.Tensor | None = None,
    groups: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> DecodePlan:
    """List the tiles of a part on the device; groups: (group_starts, group_sizes), the sequences of a prefix part."""
    num_kv_heads, block_size = k_cache.shape[1:3]
    num_requests = context_lens.shape[0]
    num_sequences = num_requests if groups is None else groups[0].shape[0]
    group_starts, group_sizes = groups or (context_lens, context_lens)
    max_row_blocks = num_sequences if groups is None else num_requests * group_size // rows + num_sequences
    max_entries = max_row_blocks * max(1, triton.cdiv(block_table.shape[1] * block_size, shape.tile))
    tile_list = torch.empty(max_entries, _ENTRY_WORDS, dtype=torch.int32, device=k_cache.device)
    list_length = torch.empty(2, dtype=torch.int32, device=k_cache.device)
    num_parts = 2 * shape.num_programs if shape.is_for_hopper else 0
    parts = torch.empty(num_parts, _ENTRY_WORDS, dtype=torch.int32, device=k_cache.device)
    padded_programs = int(triton.next_power_of_2(max(shape.num_programs, num_parts)))
    counters = torch.empty(padded_programs, dtype=torch.int32, device=k_cache.device)
    _plan_kernel[(num_sequences,)](
        block_table,
        context_lens,
        context_lens if prefix_lens is None else prefix_lens,
        group_starts,
        group_sizes,
        list_length,
        tile_list,
        parts,
        counters,
        num_sequences,
        num_kv_heads,
        block_table.stride(0),
        PART=part,
        GROUP_SIZE=group_size,
        BLOCK_SIZE=block_size,
        TILE=shape.tile,
        ROWS=rows,
        PADDED_SEQUENCES=max(16, triton.next_power_of_2(num_sequences)),
        USE_TMA=shape.use_tma,
        CHUNK=128,
        PADDED_PROGRAMS=padded_programs,
        NUM_PARTS=num_parts,
        KEEP_WHOLE=KEEP_WHOLE,
        num_warps=4,
    )
    return DecodePlan(part, rows, shape, tile_list, list_length, parts, counters)


def launch_paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    plan: DecodePlan,
    out: torch.Tensor,
    prefix_result: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Run the kernel over a plan and write `out`.

    prefix_result: (out float32 [B, num_heads, D], lse float32 [B, num_heads], base 2), written by a prefix part (which
    has the first as `out`) and read by a suffix part. The kernel for Hopper knows neither part.
    """
    num_kv_heads, block_size, head_dim = k_cache.shape[1:]
    shape, rows = plan.shape, plan.rows
    if shape.is_for_hopper:
        from blendserve_kernels.gluon_kernels import decode_attention

        plan_tensors = (plan.list_length, plan.tile_list, plan.parts, plan.counters)
        decode_attention.launch(
            *(q, k_cache, v_cache, scale, *plan_tensors, out, shape.num_programs), begins_early=BEGIN_EARLY
        )
        return
    prefix_out, prefix_lse = prefix_result or (out, out)
    num_state_rows = 2 * shape.num_programs * rows
    state = torch.empty(num_state_rows, head_dim, dtype=torch.float32, device=q.device)
    extrema = torch.empty(num_state_rows, 2, dtype=torch.float32, device=q.device)
    caches: list[object] = [k_cache, v_cache]
    if shape.use_tma:
        caches = [
            TensorDescriptor.from_tensor(cache.view(-1, head_dim), [shape.tile, head_dim])
            for cache in (k_cache, v_cache)
        ]
    _paged_attention_kernel[(shape.num_programs,)](
        q,
        *caches,
        block_table,
        plan.list_length,
        plan.tile_list,
        out,
        prefix_lse,
        prefix_out,
        prefix_lse,
        state,
        extrema,
        plan.counters,
        num_kv_heads,
        q.stride(0),
        block_table.stride(0),
        scale / math.log(2),
        PART=plan.part,
        GROUP_SIZE=q.shape[1] // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        TILE=shape.tile,
        ROWS=rows,
        USE_TMA=shape.use_tma,
        IS_COMPILED=q.is_cuda,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        NUM_STAGES=shape.num_stages,
        num_warps=shape.num_warps,
    )


def rows_of_group(group_size: int) -> int:
    """Return the rows of a query tile that holds the heads of one request over one KV head; tensor cores take 16."""
    return max(16, int(triton.next_power_of_2(group_size)))


def plan_decode_triton(
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    num_heads: int,
    num_programs: int | None = None,
    shape: LaunchShape | None = None,
) -> DecodePlan:
    """Launch `decode_attention.plan_decode`; arguments as there, unchecked."""
    group_size = num_heads // k_cache.shape[1]
    rows = rows_of_group(group_size)
    shape = shape or choose_decode_shape(k_cache, group_size, num_programs)
    return make_plan(k_cache, block_table, context_lens, group_size, part=PLAIN_PART, rows=rows, shape=shape)


def decode_attention_triton(
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
    """Launch `decode_attention.decode_attention`; arguments as there, unchecked. No host sync: safe to capture."""
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    if plan is None:
        plan = plan_decode_triton(k_cache, block_table, context_lens, q.shape[1], num_programs)
    launch_paged_attention(q, k_cache, v_cache, block_table, scale, plan, out)
    return out
