"""Rotary position embedding of q and k, and the store of k and v into the paged cache, in one pass."""

from __future__ import annotations

import torch

from blendserve_kernels import reference
from blendserve_kernels.argument_checks import (
    check_dtype,
    check_inner_contiguous,
    check_kv_cache,
    check_rank,
    check_same_device,
    check_shape,
)


def rotary_and_store_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """Rotate q and k, write k and v to their slots, return the rotated q (contiguous; q itself stays as it is).

    q: [num_tokens, num_heads, head_dim]; k, v: [num_tokens, num_kv_heads, head_dim]; tokens may be strided.
    positions: int64 [num_tokens]. cos_sin: float32 [max_position, head_dim], head_dim / 2 cosines, then as many sines;
    the halves of a head rotate against each other, as in transformers' Llama.
    k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim], written in place.
    slot_mapping: int64 [num_tokens], block * block_size + offset; -1 marks a padding token, which stores nothing.
    """
    check_kv_cache(q, k_cache, v_cache)
    num_tokens, head_dim = q.shape[0], q.shape[2]
    check_shape("k", k, [num_tokens, k_cache.shape[1], head_dim])
    check_shape("v", v, k.shape)
    check_shape("positions", positions, [num_tokens])
    check_shape("slot_mapping", slot_mapping, [num_tokens])
    check_rank("cos_sin", cos_sin, "[max_position, head_dim]")
    check_shape("cos_sin", cos_sin, [cos_sin.shape[0], head_dim])
    check_dtype("k", k, q.dtype)
    check_dtype("v", v, q.dtype)
    check_dtype("positions", positions, torch.int64)
    check_dtype("slot_mapping", slot_mapping, torch.int64)
    check_dtype("cos_sin", cos_sin, torch.float32)
    check_inner_contiguous("k", k, 2)
    check_inner_contiguous("v", v, 2)
    check_inner_contiguous("cos_sin", cos_sin, 2)
    check_same_device(
        "q",
        q,
        k=k,
        v=v,
        positions=positions,
        cos_sin=cos_sin,
        k_cache=k_cache,
        v_cache=v_cache,
        slot_mapping=slot_mapping,
    )
    if q.is_cuda:
        from blendserve_kernels.triton_kernels.rotary import rotary_and_store_kv_triton

        return rotary_and_store_kv_triton(q, k, v, positions, cos_sin, k_cache, v_cache, slot_mapping)
    return reference.rotary_and_store_kv(q, k, v, positions, cos_sin, k_cache, v_cache, slot_mapping)
