"""Triton copy of KV cache blocks: one program per copy, plane and head."""

# Kernel parameters are typed by Triton, constexprs are capitals by its custom.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl


# The copies are parts of a longer array, which begin anywhere: one kernel for all of them.
@triton.jit(do_not_specialize_on_alignment=["sources_ptr", "targets_ptr", "num_tokens_ptr"])
def _copy_blocks_kernel(
    blocks_ptr,
    sources_ptr,
    targets_ptr,
    num_tokens_ptr,
    num_blocks,
    num_kv_heads,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
):
    copy = tl.program_id(0)
    plane = (tl.program_id(1) // num_kv_heads).to(tl.int64)
    head = tl.program_id(1) % num_kv_heads
    tile_size: tl.constexpr = BLOCK_SIZE * HEAD_DIM
    source = ((plane * num_blocks + tl.load(sources_ptr + copy)) * num_kv_heads + head) * tile_size
    target = ((plane * num_blocks + tl.load(targets_ptr + copy)) * num_kv_heads + head) * tile_size
    num_elements = tl.load(num_tokens_ptr + copy).to(tl.int32) * HEAD_DIM
    for begin in tl.range(0, num_elements, CHUNK):
        offsets = begin + tl.arange(0, CHUNK)
        is_inside = offsets < num_elements
        values = tl.load(blocks_ptr + source + offsets, mask=is_inside, other=0.0)
        tl.store(blocks_ptr + target + offsets, values, mask=is_inside)


def copy_blocks_triton(
    blocks: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor, num_tokens: torch.Tensor
) -> torch.Tensor:
    """Launch `copy_blocks.copy_blocks`; arguments as there, unchecked. No host sync."""
    num_planes, num_blocks, num_kv_heads, block_size, head_dim = blocks.shape
    if sources.shape[0] == 0:
        return blocks
    _copy_blocks_kernel[(sources.shape[0], num_planes * num_kv_heads)](
        blocks,
        sources,
        targets,
        num_tokens,
        num_blocks,
        num_kv_heads,
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        CHUNK=2048,
        num_warps=4,
    )
    return blocks
