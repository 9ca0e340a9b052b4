"""Decode attention for Hopper: a program holds two parts of the work, each with a warp that copies and a warp group.

The plan, the parts and the merging of cut items are those of `triton_kernels.decode_attention`. Two parts, so that one
warp group's softmax hides behind the other's products; a warp for each, so that a part that merges does not hold up the
other one's copies. The scores are computed transposed: keys are the rows of the warp group's instruction, read straight
from shared memory, and the queries of a KV head its 8 or 16 columns. Of a tile at the end of a context only the boxes
of keys that are valid are copied.
"""

# Kernel parameters are typed by Gluon, constexprs are capitals by its custom.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment,index"
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
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from blendserve_kernels.gluon_kernels.alignment import aligned

TILE = 64  # keys a tile
BOX = 8  # keys a copy, where a tile holds fewer than TILE
STAGES_OF_FEW, STAGES_OF_MANY = 3, 2  # tiles in flight a part: few programs fill the memory's queue only with a third
_FEW_PROGRAMS = 64  # up to so many are few
_PANEL = 64  # columns of a copy: 128 bytes, as wide as shared memory is swizzled

FLAG_FIRST = gl.constexpr(1 << 9)
FLAG_LAST = gl.constexpr(1 << 10)
SHIFT_ROWS = gl.constexpr(12)

# Renamed between Triton 3.6 and 3.7.
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def _part_begin(part, total_tiles, num_parts):
    """Return where a part begins: the first total % P parts are longer by one."""
    return part * (total_tiles // num_parts) + gl.minimum(part, total_tiles % num_parts)


@gluon.jit
def _part_of(index, total_tiles, num_parts):
    """Return the part that holds `index`."""
    short = total_tiles // num_parts
    num_long = total_tiles % num_parts
    end_of_long = num_long * (short + 1)
    part = index // (short + 1)
    if index >= end_of_long:
        part = num_long + (index - end_of_long) // short
    return part


@gluon.jit
def index_at(step, part_begin, part_end, tail):
    """Return the tile of a step: a part begins with its last item, then takes the others in order.

    The items that other parts share are thus done first, and their merging hides behind the rest.
    """
    index = tail + step
    return gl.where(index >= part_end, index - (part_end - part_begin), index)


@gluon.jit
def _copy_boxes(
    desc, cache_row, num_boxes, barrier, boxes, slot, PANELS: gl.constexpr, BOXES: gl.constexpr, BOX: gl.constexpr
):
    """Copy the first boxes of keys of a tile; the barrier expects their bytes already."""
    for box in gl.static_range(BOXES):
        for panel in gl.static_range(PANELS):
            tma.async_copy_global_to_shared(
                desc,
                [cache_row + box * BOX, panel * 64],
                barrier,
                boxes.index((slot * PANELS + panel) * BOXES + box),
                pred=num_boxes > box,
            )


@gluon.jit
def copy_keys(
    q_desc,
    k_desc,
    k_box_desc,
    q_row,
    cache_row,
    num_valid,
    slot,
    q_tiles,
    k_tiles,
    k_boxes,
    k_full,
    v_full,
    HEAD_DIM: gl.constexpr,
    TILE: gl.constexpr,
    BOX: gl.constexpr,
    COLUMNS: gl.constexpr,
):
    """Copy a tile's queries and keys, only the boxes of valid ones; the barriers expect its values, too."""
    BOXES: gl.constexpr = TILE // BOX
    ROW_BYTES: gl.constexpr = HEAD_DIM * (k_desc.dtype.primitive_bitwidth // 8)
    k_barrier, v_barrier = k_full.index(slot), v_full.index(slot)
    if num_valid == TILE:
        mbarrier.expect(k_barrier, (TILE + COLUMNS) * ROW_BYTES)
        mbarrier.expect(v_barrier, TILE * ROW_BYTES)
        tma.async_copy_global_to_shared(q_desc, [q_row, 0], k_barrier, q_tiles.index(slot))
        tma.async_copy_global_to_shared(k_desc, [cache_row, 0], k_barrier, k_tiles.index(slot))
    else:
        num_boxes = gl.maximum((num_valid + BOX - 1) // BOX, 1)  # an empty context has a tile, too
        for box in gl.static_range(BOXES):
            is_number = num_boxes == box + 1
            mbarrier.expect(k_barrier, ((box + 1) * BOX + COLUMNS) * ROW_BYTES, pred=is_number)
            mbarrier.expect(v_barrier, (box + 1) * BOX * ROW_BYTES, pred=is_number)
        tma.async_copy_global_to_shared(q_desc, [q_row, 0], k_barrier, q_tiles.index(slot))
        _copy_boxes(k_box_desc, cache_row, num_boxes, k_barrier, k_boxes, slot, HEAD_DIM // 64, BOXES, BOX)


@gluon.jit
def copy_values(
    v_desc,
    v_box_desc,
    cache_row,
    num_valid,
    slot,
    v_tiles,
    v_boxes,
    v_full,
    HEAD_DIM: gl.constexpr,
    TILE: gl.constexpr,
    BOX: gl.constexpr,
):
    """Copy what `copy_keys` leaves of a tile."""
    if num_valid == TILE:
        tma.async_copy_global_to_shared(v_desc, [cache_row, 0], v_full.index(slot), v_tiles.index(slot))
    else:
        num_boxes = gl.maximum((num_valid + BOX - 1) // BOX, 1)
        _copy_boxes(
            *(v_box_desc, cache_row, num_boxes, v_full.index(slot), v_boxes, slot),
            *(HEAD_DIM // 64, TILE // BOX, BOX),
        )


@gluon.jit
def _copy_part(
    stream: gl.constexpr,
    list_length_ptr,
    list_ptr,
    parts_ptr,
    q_desc,
    k_desc,
    v_desc,
    k_box_desc,
    v_box_desc,
    q_tiles,
    k_tiles,
    v_tiles,
    k_boxes,
    v_boxes,
    k_full,
    v_full,
    empty,
    num_kv_heads,
    GROUP_SIZE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    TILE: gl.constexpr,
    BOX: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    BEGINS_EARLY: gl.constexpr,
):
    """Copy queries, keys and values of one part's tiles, each as soon as a slot is free; the list is read ahead."""
    if BEGINS_EARLY:
        gdc_wait()  # from here on what came before is done, so what comes next may begin
        gdc_launch_dependents()
    list_length = gl.load(list_length_ptr)
    words = parts_ptr + (2 * gl.program_id(0) + stream) * 8
    part_begin, part_end, index = gl.load(words), gl.load(words + 1), gl.load(words + 2)
    place, first_row, flags = gl.load(words + 3), gl.load(words + 4), gl.load(words + 5)
    tail = index
    num_heads = num_kv_heads * GROUP_SIZE
    for step in range(part_end - part_begin):
        next_index = index_at(step + 1, part_begin, part_end, tail)
        words = list_ptr + next_index % list_length * 8
        next_place, next_row, next_flags = gl.load(words), gl.load(words + 1), gl.load(words + 2)
        num_valid = flags & (FLAG_FIRST - 1)
        kv_head = index // list_length
        cache_row = place + kv_head * BLOCK_SIZE
        q_row = first_row // GROUP_SIZE * num_heads + kv_head * GROUP_SIZE
        slot = stream * STAGES + step % STAGES
        mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
        copy_keys(
            *(q_desc, k_desc, k_box_desc, q_row, cache_row, num_valid, slot, q_tiles, k_tiles, k_boxes),
            *(k_full, v_full, HEAD_DIM, TILE, BOX, COLUMNS),
        )
        copy_values(
            *(v_desc, v_box_desc, cache_row, num_valid, slot, v_tiles, v_boxes, v_full),
            *(HEAD_DIM, TILE, BOX),
        )
        index, place, first_row, flags = next_index, next_place, next_row, next_flags


@gluon.jit
def store_result(
    out,
    row_sum,
    first_row,
    num_rows,
    kv_head,
    num_heads,
    out_ptr,
    GROUP_SIZE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    COLUMNS: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Normalise the finished rows [COLUMNS, HEAD_DIM] of an item and write them."""
    number = gl.arange(0, COLUMNS, gl.SliceLayout(1, LAYOUT))
    dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, LAYOUT))
    row = first_row + number
    index = (row // GROUP_SIZE).to(gl.int64) * num_heads + kv_head * GROUP_SIZE + row % GROUP_SIZE
    safe_sum = gl.where(row_sum == 0.0, 1.0, row_sum)
    out = out / safe_sum[:, None]
    offsets = index[:, None] * HEAD_DIM + dims[None, :]
    gl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=(number < num_rows)[:, None])


@gluon.jit
def leave_state(
    out,
    row_max,
    row_sum,
    part,
    part_begin,
    item_begin,
    num_tiles,
    total_tiles,
    num_parts,
    state_ptr,
    extrema_ptr,
    counters_ptr,
    HEAD_DIM: gl.constexpr,
    COLUMNS: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Leave a part's state of a cut item in the workspace; return whether all are there, and whose they are."""
    slot = part * 2 + (item_begin >= part_begin).to(gl.int32)
    rows = slot * COLUMNS + gl.arange(0, COLUMNS, gl.SliceLayout(1, LAYOUT))
    dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, LAYOUT))
    gl.store(state_ptr + rows[:, None] * HEAD_DIM + dims[None, :], out)
    gl.store(extrema_ptr + rows * 2, row_max)
    gl.store(extrema_ptr + rows * 2 + 1, row_sum)
    first_part = _part_of(item_begin, total_tiles, num_parts)
    last_part = _part_of(item_begin + num_tiles - 1, total_tiles, num_parts)
    _barrier()  # all threads' states are written before they are announced
    num_arrived = gl.atomic_add(counters_ptr + first_part, 1, sem="acq_rel", scope="gpu")
    _barrier()
    is_last = num_arrived == last_part - first_part
    gl.store(counters_ptr + first_part, 0, mask=is_last)  # ready for the next launch
    return is_last, first_part, last_part


@gluon.jit
def merge_states(
    item_begin,
    first_part,
    last_part,
    total_tiles,
    num_parts,
    state_ptr,
    extrema_ptr,
    HEAD_DIM: gl.constexpr,
    COLUMNS: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Merge the states that parts left of an item, in the order of the parts."""
    number = gl.arange(0, COLUMNS, gl.SliceLayout(1, LAYOUT))
    dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, LAYOUT))
    out = gl.zeros([COLUMNS, HEAD_DIM], gl.float32, LAYOUT)
    row_max = gl.full([COLUMNS], float("-inf"), gl.float32, gl.SliceLayout(1, LAYOUT))
    row_sum = gl.zeros([COLUMNS], gl.float32, gl.SliceLayout(1, LAYOUT))
    for part in range(first_part, last_part + 1):
        is_begun_here = item_begin >= _part_begin(part, total_tiles, num_parts)
        rows = (part * 2 + is_begun_here.to(gl.int32)) * COLUMNS + number
        part_max = gl.load(extrema_ptr + rows * 2, cache_modifier=".cg")
        part_sum = gl.load(extrema_ptr + rows * 2 + 1, cache_modifier=".cg")
        part_out = gl.load(state_ptr + rows[:, None] * HEAD_DIM + dims[None, :], cache_modifier=".cg")
        new_max = gl.maximum(row_max, part_max)
        safe_max = gl.where(new_max == float("-inf"), 0.0, new_max)
        old_weight = gl.exp2(row_max - safe_max)
        part_weight = gl.exp2(part_max - safe_max)
        out = out * old_weight[:, None] + part_out * part_weight[:, None]
        row_sum = row_sum * old_weight + part_sum * part_weight
        row_max = new_max
    return out, row_max, row_sum


@gluon.jit
def attend_to_tile(
    slot,
    phase,
    num_valid,
    is_first,
    accumulator,
    row_max,
    weight_sums,
    q_tiles,
    k_tiles,
    v_tiles,
    weights_own,
    k_full,
    v_full,
    empty,
    scale_log2e,
    HEAD_DIM: gl.constexpr,
    TILE: gl.constexpr,
    COLUMNS: gl.constexpr,
    MMA: gl.constexpr,
):
    """Return what becomes of an item's state, all of it transposed, with the tile in a slot."""
    key = gl.arange(0, TILE, gl.SliceLayout(1, MMA))
    mbarrier.wait(k_full.index(slot), phase)
    scores = warpgroup_mma(
        k_tiles.index(slot),
        q_tiles.index(slot).permute((1, 0)),
        gl.zeros([TILE, COLUMNS], gl.float32, MMA),
        use_acc=False,
    )
    scores = gl.where((key < num_valid)[:, None], scores * scale_log2e, float("-inf"))
    row_max = gl.where(is_first, float("-inf"), row_max)
    new_max = gl.maximum(row_max, gl.max(scores, axis=0))
    safe_max = gl.where(new_max == float("-inf"), 0.0, new_max)
    weights = gl.exp2(scores - safe_max[None, :])
    decay = gl.where(is_first, 0.0, gl.exp2(row_max - safe_max))
    weight_sums = gl.where(is_first, 0.0, weight_sums * decay[None, :]) + weights
    accumulator = gl.where(is_first, 0.0, accumulator * decay[None, :])
    weights_own.store(gl.permute(weights.to(v_tiles.dtype), (1, 0)))
    mbarrier.wait(v_full.index(slot), phase)
    if num_valid < TILE:
        # What lies behind the context may be NaN, and 0 * NaN is NaN.
        V_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
        v_key = gl.arange(0, TILE, gl.SliceLayout(1, V_LAYOUT))
        v_tile = v_tiles.index(slot)
        v = v_tile.load(V_LAYOUT)
        _barrier()
        v_tile.store(gl.where((v_key < num_valid)[:, None], v, gl.zeros_like(v)))
    fence_async_shared()
    _barrier()
    accumulator = warpgroup_mma(v_tiles.index(slot).permute((1, 0)), weights_own.permute((1, 0)), accumulator)
    _barrier()  # every warp has read the slot
    mbarrier.arrive(empty.index(slot), count=1)
    return accumulator, new_max, weight_sums


@gluon.jit
def _attend_to_part(
    stream: gl.constexpr,
    list_length_ptr,
    list_ptr,
    parts_ptr,
    out_ptr,
    state_ptr,
    extrema_ptr,
    counters_ptr,
    q_tiles,
    k_tiles,
    v_tiles,
    weights_buffer,
    k_full,
    v_full,
    empty,
    num_kv_heads,
    scale_log2e,
    GROUP_SIZE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    TILE: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    BEGINS_EARLY: gl.constexpr,
):
    """Work through one part: the softmax over its tiles, the results of its items, and the items that are cut."""
    if BEGINS_EARLY:
        gdc_wait()
    # 1. Which part is it?
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
        # 2. The tiles, item after item.
        accumulator = gl.zeros([HEAD_DIM, COLUMNS], gl.float32, MMA)
        row_max = gl.full([COLUMNS], float("-inf"), gl.float32, gl.SliceLayout(0, MMA))
        weight_sums = gl.zeros([TILE, COLUMNS], gl.float32, MMA)
        tail = index
        for step in range(part_end - part_begin):
            next_index = index_at(step + 1, part_begin, part_end, tail)
            words = list_ptr + next_index % list_length * 8
            next_row, next_flags, next_entry = gl.load(words + 1), gl.load(words + 2), gl.load(words + 3)
            accumulator, row_max, weight_sums = attend_to_tile(
                stream * STAGES + step % STAGES,
                step // STAGES & 1,
                flags & (FLAG_FIRST - 1),
                ((flags & FLAG_FIRST) != 0) | (index == part_begin),
                *(accumulator, row_max, weight_sums, q_tiles, k_tiles, v_tiles, weights_buffer.index(stream)),
                *(k_full, v_full, empty, scale_log2e, HEAD_DIM, TILE, COLUMNS, MMA),
            )
            if ((flags & FLAG_LAST) != 0) | (index == part_end - 1):
                kv_head = index // list_length
                item_begin = kv_head * list_length + item_entry
                rows = (first_row, flags >> SHIFT_ROWS, kv_head, num_heads)
                out = gl.convert_layout(gl.permute(accumulator, (1, 0)), ROWS)
                out_max = gl.convert_layout(row_max, gl.SliceLayout(1, ROWS))
                out_sum = gl.convert_layout(gl.sum(weight_sums, axis=0), gl.SliceLayout(1, ROWS))
                if ((flags & FLAG_LAST) != 0) & (item_begin >= part_begin):
                    store_result(out, out_sum, *rows, out_ptr, GROUP_SIZE, HEAD_DIM, COLUMNS, ROWS)
                else:
                    # Other parts share the item: leave its state, and merge all of them if theirs are there already.
                    num_tiles = gl.load(list_ptr + item_entry * 8 + 4)
                    is_last, first_part, last_part = leave_state(
                        *(out, out_max, out_sum, part, part_begin, item_begin, num_tiles, total_tiles, num_parts),
                        *(state_ptr, extrema_ptr, counters_ptr, HEAD_DIM, COLUMNS, ROWS),
                    )
                    if is_last:
                        merged, _merged_max, merged_sum = merge_states(
                            *(item_begin, first_part, last_part, total_tiles, num_parts, state_ptr, extrema_ptr),
                            *(HEAD_DIM, COLUMNS, ROWS),
                        )
                        store_result(merged, merged_sum, *rows, out_ptr, GROUP_SIZE, HEAD_DIM, COLUMNS, ROWS)
            index, first_row, flags, item_entry = next_index, next_row, next_flags, next_entry


@gluon.jit
def _paged_attention_kernel(
    q_desc,
    k_desc,
    v_desc,
    k_box_desc,
    v_box_desc,
    list_length_ptr,
    list_ptr,
    parts_ptr,
    out_ptr,
    state_ptr,
    extrema_ptr,
    counters_ptr,
    num_kv_heads,
    scale_log2e,
    GROUP_SIZE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    TILE: gl.constexpr,
    BOX: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    BEGINS_EARLY: gl.constexpr,
):
    PANELS: gl.constexpr = HEAD_DIM // 64
    BOXES: gl.constexpr = TILE // BOX
    dtype: gl.constexpr = k_desc.dtype
    q_tiles = gl.allocate_shared_memory(dtype, [2 * STAGES, COLUMNS, HEAD_DIM], q_desc.layout)
    k_tiles = gl.allocate_shared_memory(dtype, [2 * STAGES, TILE, HEAD_DIM], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [2 * STAGES, TILE, HEAD_DIM], v_desc.layout)
    # Boxes of a tile lie in it panel by panel.
    k_boxes = k_tiles._reinterpret(dtype, [2 * STAGES * PANELS * BOXES, BOX, 64], k_box_desc.layout)
    v_boxes = v_tiles._reinterpret(dtype, [2 * STAGES * PANELS * BOXES, BOX, 64], v_box_desc.layout)
    weights_buffer = gl.allocate_shared_memory(dtype, [2, COLUMNS, TILE], q_desc.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(2 * STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _attend_to_part,
                (
                    0,
                    list_length_ptr,
                    list_ptr,
                    parts_ptr,
                    out_ptr,
                    state_ptr,
                    extrema_ptr,
                    counters_ptr,
                    q_tiles,
                    k_tiles,
                    v_tiles,
                    weights_buffer,
                    k_full,
                    v_full,
                    empty,
                    num_kv_heads,
                    scale_log2e,
                    GROUP_SIZE,
                    HEAD_DIM,
                    TILE,
                    COLUMNS,
                    STAGES,
                    BEGINS_EARLY,
                ),
            ),
            (
                _attend_to_part,
                (
                    1,
                    list_length_ptr,
                    list_ptr,
                    parts_ptr,
                    out_ptr,
                    state_ptr,
                    extrema_ptr,
                    counters_ptr,
                    q_tiles,
                    k_tiles,
                    v_tiles,
                    weights_buffer,
                    k_full,
                    v_full,
                    empty,
                    num_kv_heads,
                    scale_log2e,
                    GROUP_SIZE,
                    HEAD_DIM,
                    TILE,
                    COLUMNS,
                    STAGES,
                    BEGINS_EARLY,
                ),
            ),
            (
                _copy_part,
                (
                    0,
                    list_length_ptr,
                    list_ptr,
                    parts_ptr,
                    q_desc,
                    k_desc,
                    v_desc,
                    k_box_desc,
                    v_box_desc,
                    q_tiles,
                    k_tiles,
                    v_tiles,
                    k_boxes,
                    v_boxes,
                    k_full,
                    v_full,
                    empty,
                    num_kv_heads,
                    GROUP_SIZE,
                    HEAD_DIM,
                    BLOCK_SIZE,
                    TILE,
                    BOX,
                    COLUMNS,
                    STAGES,
                    BEGINS_EARLY,
                ),
            ),
            (
                _copy_part,
                (
                    1,
                    list_length_ptr,
                    list_ptr,
                    parts_ptr,
                    q_desc,
                    k_desc,
                    v_desc,
                    k_box_desc,
                    v_box_desc,
                    q_tiles,
                    k_tiles,
                    v_tiles,
                    k_boxes,
                    v_boxes,
                    k_full,
                    v_full,
                    empty,
                    num_kv_heads,
                    GROUP_SIZE,
                    HEAD_DIM,
                    BLOCK_SIZE,
                    TILE,
                    BOX,
                    COLUMNS,
                    STAGES,
                    BEGINS_EARLY,
                ),
            ),
        ],
        [4, 1, 1],
        [200, 80, 80],
    )


def launch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scale: float,
    list_length: torch.Tensor,
    tile_list: torch.Tensor,
    parts: torch.Tensor,
    counters: torch.Tensor,
    out: torch.Tensor,
    num_programs: int,
    *,
    begins_early: bool = False,
) -> None:
    """Run the kernel over a plan of tiles of TILE keys.

    begins_early: by programmatic dependent launch, to wait before anything is read.
    """
    num_heads = q.shape[1]
    num_kv_heads, block_size, head_dim = k_cache.shape[1:]
    group_size = num_heads // num_kv_heads
    columns = 8 if group_size <= 8 else 16
    num_stages = STAGES_OF_FEW if num_programs <= _FEW_PROGRAMS else STAGES_OF_MANY
    num_state_rows = 4 * num_programs * columns
    state = torch.empty(num_state_rows, head_dim, dtype=torch.float32, device=q.device)
    extrema = torch.empty(num_state_rows, 2, dtype=torch.float32, device=q.device)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    _paged_attention_kernel[(num_programs,)](
        TensorDescriptor.from_tensor(aligned(q.contiguous().view(-1, head_dim)), [columns, head_dim], layout),
        TensorDescriptor.from_tensor(k_cache.view(-1, head_dim), [TILE, head_dim], layout),
        TensorDescriptor.from_tensor(v_cache.view(-1, head_dim), [TILE, head_dim], layout),
        TensorDescriptor.from_tensor(k_cache.view(-1, head_dim), [BOX, _PANEL], layout),
        TensorDescriptor.from_tensor(v_cache.view(-1, head_dim), [BOX, _PANEL], layout),
        list_length,
        tile_list,
        parts,
        out,
        state,
        extrema,
        counters,
        num_kv_heads,
        scale / math.log(2),
        GROUP_SIZE=group_size,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        TILE=TILE,
        BOX=BOX,
        COLUMNS=columns,
        STAGES=num_stages,
        BEGINS_EARLY=begins_early,
        num_warps=4,
        launch_pdl=begins_early,
    )
