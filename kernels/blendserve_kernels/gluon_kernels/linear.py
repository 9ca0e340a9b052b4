"""Matrix product for Hopper, x @ weight.T: persistent, one warp copies, two warp groups multiply 64 x 256 tiles each.

With FUSED, 8 rows of the weight make gates and the next 8 the ups that belong to them, so that a thread holds both of a
pair in its registers and writes silu(gate) * up: the intermediate of twice the width never exists.

Without splits the order of every sum is fixed: a row's result depends on that row alone, whatever the batch. With them
the tiles that are left when every program has had as many as all others are cut along K, so that no program waits while
a few finish: each split leaves its sum, and the last of a tile adds them up.
"""

# Kernel parameters are typed by Gluon, constexprs are capitals by its custom.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803, N806

from __future__ import annotations

import math

import torch
import triton
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

TILE_M, TILE_N, TILE_K = 128, 256, 64
_STAGES = 4
_MAX_SPLITS = 8
_MIN_SLICES = 8  # of a split
_RING = 1 << 16  # counters for the launches that may be on their way together
_GROUP_M = 8  # tiles of rows that run together over the same columns, so that both operands stay in the L2 cache

_counter_rings: dict[torch.device, tuple[torch.Tensor, int]] = {}

# Renamed between Triton 3.6 and 3.7.
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def _tile_at(index, num_m, num_n, GROUP_M: gl.constexpr):
    """Return (row tile, column tile) of the index-th tile: groups of GROUP_M row tiles, columns by columns."""
    group = index // (GROUP_M * num_n)
    first_m = group * GROUP_M
    group_m = gl.minimum(num_m - first_m, GROUP_M)
    within = index - first_m * num_n
    return first_m + within % group_m, within // group_m


@gluon.jit
def _unit_at(index, num_m, num_n, num_k, num_whole, num_splits, GROUP_M: gl.constexpr):
    """Return (row tile, column tile, first slice, end) of the index-th unit: a whole tile, or a split of one."""
    num_cut = gl.maximum(num_m * num_n - num_whole, 1)
    within = gl.maximum(index - num_whole, 0)
    is_whole = index < num_whole
    tile = gl.where(is_whole, index, num_whole + within % num_cut)
    split = within // num_cut
    first = gl.where(is_whole, 0, split * num_k // num_splits)
    end = gl.where(is_whole, num_k, (split + 1) * num_k // num_splits)
    tile_m, tile_n = _tile_at(tile, num_m, num_n, GROUP_M)
    return tile_m, tile_n, first, end


@gluon.jit
def _copy_tiles(
    x_desc,
    weight_desc,
    x_tiles,
    weight_tiles,
    full,
    empty,
    num_m,
    num_n,
    num_k,
    num_whole,
    num_splits,
    TILE_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """Copy the operands of the program's units, slice after slice."""
    ELEMENT_BYTES: gl.constexpr = x_desc.dtype.primitive_bitwidth // 8
    num_units = num_whole + (num_m * num_n - num_whole) * num_splits
    count = 0
    for index in range(gl.program_id(0), num_units, gl.num_programs(0)):
        tile_m, tile_n, first, end = _unit_at(index, num_m, num_n, num_k, num_whole, num_splits, GROUP_M)
        for k in range(first, end):
            slot = count % STAGES
            mbarrier.wait(empty.index(slot), (count // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(slot), (128 + 256) * TILE_K * ELEMENT_BYTES)
            for half in gl.static_range(2):
                tma.async_copy_global_to_shared(
                    x_desc, [tile_m * 128 + half * 64, k * TILE_K], full.index(slot), x_tiles.index(slot * 2 + half)
                )
            tma.async_copy_global_to_shared(
                weight_desc, [tile_n * 256, k * TILE_K], full.index(slot), weight_tiles.index(slot)
            )
            count += 1


@gluon.jit
def _store_tile(value, out_desc, out_tile, row, column):
    """Write 64 x 128 results through shared memory, once the last such copy has left it."""
    tma.store_wait(pendings=0)
    _barrier()
    out_tile.store(value)
    fence_async_shared()
    _barrier()
    tma.async_copy_shared_to_global(out_desc, [row, column], out_tile)


@gluon.jit
def _activate(gate, up, dtype: gl.constexpr):
    """Return silu(gate) * up, rounded where the kernels one after the other would round."""
    gate = gate.to(dtype).to(gl.float32)
    up = up.to(dtype).to(gl.float32)
    activated = (gate / (1.0 + gl.exp(-gate))).to(dtype).to(gl.float32)
    return (activated * up).to(dtype)


@gluon.jit
def _store_product(accumulator, out_desc, out_tile, row, tile_n, FUSED: gl.constexpr):
    """Write the results of a whole half tile, [64, 256] in the layout of the product."""
    dtype: gl.constexpr = out_desc.dtype
    if FUSED:
        # 8 columns of gate, 8 of up: a thread holds 2 of the ones and the same 2 of the others.
        gate, up = gl.split(gl.permute(gl.reshape(accumulator, [64, 16, 2, 8]), (0, 1, 3, 2)))
        fused = gl.reshape(_activate(gate, up, dtype), [64, 128])
        _store_tile(fused, out_desc, out_tile, row, tile_n * 128)
    else:
        halves = gl.permute(gl.reshape(accumulator.to(dtype), [64, 2, 128]), (0, 2, 1))
        left, right = gl.split(halves)
        _store_tile(left, out_desc, out_tile, row, tile_n * 256)
        _store_tile(right, out_desc, out_tile, row, tile_n * 256 + 128)


@gluon.jit
def _sum_of_splits(sums_ptr, cut, num_cut, num_splits, columns, LAYOUT: gl.constexpr):
    """Add up 64 x 128 sums that the splits of a cut half tile left, in the order of the splits."""
    rows = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    offsets = rows[:, None] * 256 + columns[None, :]
    total = gl.zeros([64, 128], gl.float32, LAYOUT)
    for split in range(num_splits):
        total += gl.load(sums_ptr + (split * num_cut * 2 + cut) * (64 * 256) + offsets, cache_modifier=".cg")
    return total


@gluon.jit
def _store_sum_of_splits(sums_ptr, cut, num_cut, num_splits, out_desc, out_tile, row, tile_n, FUSED: gl.constexpr):
    """Finish a half tile whose splits have all left their sums."""
    dtype: gl.constexpr = out_desc.dtype
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
    column = gl.arange(0, 128, gl.SliceLayout(0, LAYOUT))
    if FUSED:
        gates = column // 8 * 16 + column % 8
        gate = _sum_of_splits(sums_ptr, cut, num_cut, num_splits, gates, LAYOUT)
        up = _sum_of_splits(sums_ptr, cut, num_cut, num_splits, gates + 8, LAYOUT)
        _store_tile(_activate(gate, up, dtype), out_desc, out_tile, row, tile_n * 128)
    else:
        for side in gl.static_range(2):
            total = _sum_of_splits(sums_ptr, cut, num_cut, num_splits, column + side * 128, LAYOUT)
            _store_tile(total.to(dtype), out_desc, out_tile, row, tile_n * 256 + side * 128)


@gluon.jit
def _leave_split(
    half: gl.constexpr,
    accumulator,
    unit,
    num_cut,
    num_splits,
    sums_ptr,
    counters_ptr,
    out_desc,
    out_tile,
    row,
    tile_n,
    FUSED: gl.constexpr,
    MMA: gl.constexpr,
):
    """Leave the sum of one split of a half tile, and finish the half tile if all others are there."""
    cut = unit % num_cut * 2 + half
    rows = gl.arange(0, 64, gl.SliceLayout(1, MMA))
    columns = gl.arange(0, 256, gl.SliceLayout(0, MMA))
    own_ptr = sums_ptr + (unit * 2 + half) * (64 * 256)
    gl.store(own_ptr + rows[:, None] * 256 + columns[None, :], accumulator)
    _barrier()  # all threads' sums are written before they are announced
    num_arrived = gl.atomic_add(counters_ptr + cut, 1, sem="acq_rel", scope="gpu")
    _barrier()
    if num_arrived == num_splits - 1:
        gl.store(counters_ptr + cut, 0)  # ready for the next launch
        _store_sum_of_splits(sums_ptr, cut, num_cut, num_splits, out_desc, out_tile, row, tile_n, FUSED)


@gluon.jit
def _multiply_tiles(
    half: gl.constexpr,
    out_desc,
    x_tiles,
    weight_tiles,
    out_tiles,
    full,
    empty,
    sums_ptr,
    counters_ptr,
    num_m,
    num_n,
    num_k,
    num_whole,
    num_splits,
    FUSED: gl.constexpr,
    SPLIT: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """Multiply one half, 64 rows, of each of the program's units."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    num_cut = num_m * num_n - num_whole
    num_units = num_whole + num_cut * num_splits
    count = 0
    for index in range(gl.program_id(0), num_units, gl.num_programs(0)):
        tile_m, tile_n, first, end = _unit_at(index, num_m, num_n, num_k, num_whole, num_splits, GROUP_M)
        accumulator = gl.zeros([64, 256], gl.float32, MMA)
        for k in range(first, end):
            slot = count % STAGES
            mbarrier.wait(full.index(slot), count // STAGES & 1)
            accumulator = warpgroup_mma(
                x_tiles.index(slot * 2 + half), weight_tiles.index(slot).permute((1, 0)), accumulator, is_async=True
            )
            accumulator = warpgroup_mma_wait(1, deps=(accumulator,))
            if k > first:
                _barrier()
                mbarrier.arrive(empty.index((count - 1) % STAGES), count=1)
            count += 1
        accumulator = warpgroup_mma_wait(0, deps=(accumulator,))
        _barrier()
        mbarrier.arrive(empty.index((count - 1) % STAGES), count=1)
        row = tile_m * 128 + half * 64
        if SPLIT:
            if index >= num_whole:
                _leave_split(
                    half,
                    accumulator,
                    index - num_whole,
                    num_cut,
                    num_splits,
                    sums_ptr,
                    counters_ptr,
                    out_desc,
                    out_tiles.index(half),
                    row,
                    tile_n,
                    FUSED,
                    MMA,
                )
            else:
                _store_product(accumulator, out_desc, out_tiles.index(half), row, tile_n, FUSED)
        else:
            _store_product(accumulator, out_desc, out_tiles.index(half), row, tile_n, FUSED)
    tma.store_wait(pendings=0)


@gluon.jit
def _linear_kernel(
    x_desc,
    weight_desc,
    out_desc,
    sums_ptr,
    counters_ptr,
    num_m,
    num_n,
    num_k,
    num_whole,
    num_splits,
    FUSED: gl.constexpr,
    SPLIT: gl.constexpr,
    TILE_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    dtype: gl.constexpr = x_desc.dtype
    x_tiles = gl.allocate_shared_memory(dtype, [2 * STAGES, 64, TILE_K], x_desc.layout)
    weight_tiles = gl.allocate_shared_memory(dtype, [STAGES, 256, TILE_K], weight_desc.layout)
    out_tiles = gl.allocate_shared_memory(dtype, [2, 64, 128], out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _multiply_tiles,
                (
                    0,
                    out_desc,
                    x_tiles,
                    weight_tiles,
                    out_tiles,
                    full,
                    empty,
                    sums_ptr,
                    counters_ptr,
                    num_m,
                    num_n,
                    num_k,
                    num_whole,
                    num_splits,
                    FUSED,
                    SPLIT,
                    STAGES,
                    GROUP_M,
                ),
            ),
            (
                _multiply_tiles,
                (
                    1,
                    out_desc,
                    x_tiles,
                    weight_tiles,
                    out_tiles,
                    full,
                    empty,
                    sums_ptr,
                    counters_ptr,
                    num_m,
                    num_n,
                    num_k,
                    num_whole,
                    num_splits,
                    FUSED,
                    SPLIT,
                    STAGES,
                    GROUP_M,
                ),
            ),
            (
                _copy_tiles,
                (
                    x_desc,
                    weight_desc,
                    x_tiles,
                    weight_tiles,
                    full,
                    empty,
                    num_m,
                    num_n,
                    num_k,
                    num_whole,
                    num_splits,
                    TILE_K,
                    STAGES,
                    GROUP_M,
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )


def choose_splits(num_tiles: int, num_k: int, num_programs: int) -> tuple[int, int]:
    """Return how many tiles stay whole, and into how many splits the others are cut: what ends soonest.

    num_k: slices of a tile. A program multiplies a slice in about 0.8 us on an H100; the sum of one split takes it the
    time of three to leave and to add up.
    """
    num_cut = num_tiles % num_programs

    def rounds(num_splits: int) -> float:
        slices = math.ceil(num_cut * num_splits / num_programs) * math.ceil(num_k / num_splits)
        return slices + (4 + 3 * num_splits if num_splits > 1 else 0)

    most = min(_MAX_SPLITS, 2 * num_programs // max(num_cut, 1), num_k // _MIN_SLICES)
    num_splits = min(range(1, max(most, 1) + 1), key=rounds)
    return (num_tiles, 1) if num_splits == 1 else (num_tiles - num_cut, num_splits)


def _counters(device: torch.device, count: int) -> torch.Tensor:
    """Return `count` zeros that this launch leaves as zeros; the next launches get others, since they may overlap."""
    if device not in _counter_rings:
        _counter_rings[device] = (torch.zeros(_RING, dtype=torch.int32, device=device), 0)
    ring, begin = _counter_rings[device]
    begin = begin if begin + count <= _RING else 0
    _counter_rings[device] = (ring, begin + count)
    return ring[begin : begin + count]


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    is_fused: bool,
    num_programs: int,
    *,
    can_split: bool = False,
) -> None:
    """Write x @ weight.T, or its gated activation, to `out`.

    x: [T, K]; weight: [N, K], N a multiple of 256, K of 64; out: [T, N], or [T, N / 2] if fused; rows contiguous.
    can_split: whether the order of sums may depend on T and num_programs, so that no program idles.
    """
    num_m = triton.cdiv(x.shape[0], TILE_M)
    num_n = weight.shape[0] // TILE_N
    num_k = x.shape[1] // TILE_K
    num_tiles = num_m * num_n
    num_whole, num_splits = choose_splits(num_tiles, num_k, num_programs) if can_split else (num_tiles, 1)
    num_cut = num_tiles - num_whole
    sums = counters = None
    if num_cut:
        sums = torch.empty(num_cut * num_splits, TILE_M * TILE_N, dtype=torch.float32, device=x.device)
        counters = _counters(x.device, 2 * num_cut)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    _linear_kernel[(min(num_programs, num_whole + num_cut * num_splits),)](
        TensorDescriptor.from_tensor(aligned(x), [64, TILE_K], layout),
        TensorDescriptor.from_tensor(weight, [TILE_N, TILE_K], layout),
        TensorDescriptor.from_tensor(out, [64, 128], layout),
        sums,
        counters,
        num_m,
        num_n,
        num_k,
        num_whole,
        num_splits,
        FUSED=is_fused,
        SPLIT=num_cut > 0,
        TILE_K=TILE_K,
        STAGES=_STAGES,
        GROUP_M=_GROUP_M,
        num_warps=4,
    )
