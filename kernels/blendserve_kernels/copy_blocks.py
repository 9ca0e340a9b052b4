"""Copies beginnings of KV cache blocks to other blocks, in all layers at once."""

from __future__ import annotations

import torch

from blendserve_kernels import reference
from blendserve_kernels.argument_checks import check_dtype, check_rank, check_same_device, check_shape


def copy_blocks(
    blocks: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor, num_tokens: torch.Tensor
) -> torch.Tensor:
    """Copy the first num_tokens[i] tokens of block sources[i] to block targets[i]. Returns `blocks`, changed in place.

    blocks: [num_planes, num_blocks, num_kv_heads, block_size, head_dim], contiguous; a plane is K or V of a layer.
    sources, targets, num_tokens: int64 [num_copies], targets distinct and none of them a source.
    """
    check_rank("blocks", blocks, "[num_planes, num_blocks, num_kv_heads, block_size, head_dim]")
    if not blocks.is_contiguous():
        raise ValueError(f"Invalid strides of blocks: expected a contiguous tensor, got {blocks.stride()}")
    arguments = {"sources": sources, "targets": targets, "num_tokens": num_tokens}
    for name, tensor in arguments.items():
        check_shape(name, tensor, [sources.shape[0]])
        check_dtype(name, tensor, torch.int64)
    check_same_device("blocks", blocks, **arguments)
    if blocks.is_cuda:
        from blendserve_kernels.triton_kernels.copy_blocks import copy_blocks_triton

        return copy_blocks_triton(blocks, sources, targets, num_tokens)
    return reference.copy_blocks(blocks, sources, targets, num_tokens)
