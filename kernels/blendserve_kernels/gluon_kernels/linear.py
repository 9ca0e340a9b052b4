"""Matrix product for Hopper, x @ weight.T: persistent, one warp copies, two warp groups multiply 64 x 256 tiles each.

With FUSED, 8 rows of the weight make gates and the next 8 the ups that belong to them, so that a thread holds both of a
pair in its registers and writes silu(gate) * up: the intermediate of twice the width never exists. The order of every
sum is fixed: a row's result depends on that row alone, whatever the batch.
"""

# Kernel parameters are typed by Gluon, constexprs are capitals by its custom.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803, N806

from __future__ import annotations

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
_GROUP_M = 8  # tiles of rows that run together over the same columns, so that both operands stay in the L2 cache

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
    TILE_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """Copy the operands of the program's tiles, slice after slice."""
    ELEMENT_BYTES: gl.constexpr = x_desc.dtype.primitive_bitwidth // 8
    count = 0
    for index in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        tile_m, tile_n = _tile_at(index, num_m, num_n, GROUP_M)
        for k in range(num_k):
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
def _multiply_tiles(
    half: gl.constexpr,
    out_desc,
    x_tiles,
    weight_tiles,
    out_tiles,
    full,
    empty,
    num_m,
    num_n,
    num_k,
    FUSED: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """Multiply one half, 64 rows, of each of the program's tiles."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    dtype: gl.constexpr = out_desc.dtype
    count = 0
    for index in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        tile_m, tile_n = _tile_at(index, num_m, num_n, GROUP_M)
        accumulator = gl.zeros([64, 256], gl.float32, MMA)
        for k in range(num_k):
            slot = count % STAGES
            mbarrier.wait(full.index(slot), count // STAGES & 1)
            accumulator = warpgroup_mma(
                x_tiles.index(slot * 2 + half), weight_tiles.index(slot).permute((1, 0)), accumulator, is_async=True
            )
            accumulator = warpgroup_mma_wait(1, deps=(accumulator,))
            if k > 0:
                _barrier()
                mbarrier.arrive(empty.index((count - 1) % STAGES), count=1)
            count += 1
        accumulator = warpgroup_mma_wait(0, deps=(accumulator,))
        _barrier()
        mbarrier.arrive(empty.index((count - 1) % STAGES), count=1)
        row = tile_m * 128 + half * 64
        if FUSED:
            # 8 columns of gate, 8 of up: a thread holds 2 of the ones and the same 2 of the others.
            gate, up = gl.split(gl.permute(gl.reshape(accumulator, [64, 16, 2, 8]), (0, 1, 3, 2)))
            # Rounded where the kernels one after the other would round.
            gate = gate.to(dtype).to(gl.float32)
            up = up.to(dtype).to(gl.float32)
            activated = (gate / (1.0 + gl.exp(-gate))).to(dtype).to(gl.float32)
            fused = gl.reshape((activated * up).to(dtype), [64, 128])
            _store_tile(fused, out_desc, out_tiles.index(half), row, tile_n * 128)
        else:
            halves = gl.permute(gl.reshape(accumulator.to(dtype), [64, 2, 128]), (0, 2, 1))
            left, right = gl.split(halves)
            _store_tile(left, out_desc, out_tiles.index(half), row, tile_n * 256)
            _store_tile(right, out_desc, out_tiles.index(half), row, tile_n * 256 + 128)
    tma.store_wait(pendings=0)


@gluon.jit
def _linear_kernel(
    x_desc,
    weight_desc,
    out_desc,
    num_m,
    num_n,
    num_k,
    FUSED: gl.constexpr,
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
                    num_m,
                    num_n,
                    num_k,
                    FUSED,
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
                    num_m,
                    num_n,
                    num_k,
                    FUSED,
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
                    TILE_K,
                    STAGES,
                    GROUP_M,
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )


def launch(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, is_fused: bool, num_programs: int) -> None:
    """Write x @ weight.T, or its gated activation, to `out`.

    x: [T, K]; weight: [N, K], N a multiple of 256, K of 64; out: [T, N], or [T, N / 2] if fused; rows contiguous.
    """
    num_m = triton.cdiv(x.shape[0], TILE_M)
    num_n = weight.shape[0] // TILE_N
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    _linear_kernel[(min(num_programs, num_m * num_n),)](
        TensorDescriptor.from_tensor(aligned(x), [64, TILE_K], layout),
        TensorDescriptor.from_tensor(weight, [TILE_N, TILE_K], layout),
        TensorDescriptor.from_tensor(out, [64, 128], layout),
        num_m,
        num_n,
        x.shape[1] // TILE_K,
        FUSED=is_fused,
        TILE_K=TILE_K,
        STAGES=_STAGES,
        GROUP_M=_GROUP_M,
        num_warps=4,
    )
