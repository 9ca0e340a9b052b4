"""Triton rotary embedding of q and k with the store of k and v to their slots: one program per token."""

# Kernel parameters are typed by Triton, constexprs are capitals by its custom.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803, N806

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from blendserve_kernels.triton_kernels import decode_attention


@triton.jit
def _rotate(x_ptr, offsets, mask, half_dim, cos, sin):
    first = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + offsets + half_dim, mask=mask, other=0.0).to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _rotary_and_store_kv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_out_ptr,
    k_cache_ptr,
    v_cache_ptr,
    positions_ptr,
    slot_mapping_ptr,
    cos_sin_ptr,
    q_token_stride,
    k_token_stride,
    v_token_stride,
    num_heads,
    num_kv_heads,
    block_size,
    HEAD_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KV_HEADS: tl.constexpr,
    LETS_NEXT_BEGIN: tl.constexpr,
):
    if LETS_NEXT_BEGIN:
        gdc_launch_dependents()
    HALF_DIM: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    half = tl.arange(0, BLOCK_HALF)[None, :]
    is_dim = half < HALF_DIM
    position = tl.load(positions_ptr + token)
    cos = tl.load(cos_sin_ptr + position * HEAD_DIM + half, mask=is_dim, other=0.0)
    sin = tl.load(cos_sin_ptr + position * HEAD_DIM + HALF_DIM + half, mask=is_dim, other=0.0)

    heads = tl.arange(0, BLOCK_HEADS)[:, None]
    is_head = (heads < num_heads) & is_dim
    q_offsets = heads * HEAD_DIM + half
    first, second = _rotate(q_ptr + token * q_token_stride, q_offsets, is_head, HALF_DIM, cos, sin)
    q_out = q_out_ptr + token * num_heads * HEAD_DIM + q_offsets
    tl.store(q_out, first.to(q_out_ptr.dtype.element_ty), mask=is_head)
    tl.store(q_out + HALF_DIM, second.to(q_out_ptr.dtype.element_ty), mask=is_head)

    slot = tl.load(slot_mapping_ptr + token)
    kv_heads = tl.arange(0, BLOCK_KV_HEADS)[:, None]
    is_stored = (kv_heads < num_kv_heads) & is_dim & (slot >= 0)
    kv_offsets = kv_heads * HEAD_DIM + half
    cache_row = ((slot // block_size) * num_kv_heads + kv_heads) * block_size + slot % block_size
    cache_offsets = cache_row * HEAD_DIM + half
    first, second = _rotate(k_ptr + token * k_token_stride, kv_offsets, is_stored, HALF_DIM, cos, sin)
    tl.store(k_cache_ptr + cache_offsets, first.to(k_cache_ptr.dtype.element_ty), mask=is_stored)
    tl.store(k_cache_ptr + cache_offsets + HALF_DIM, second.to(k_cache_ptr.dtype.element_ty), mask=is_stored)
    v_ptrs = v_ptr + token * v_token_stride + kv_offsets
    tl.store(v_cache_ptr + cache_offsets, tl.load(v_ptrs, mask=is_stored), mask=is_stored)
    tl.store(v_cache_ptr + cache_offsets + HALF_DIM, tl.load(v_ptrs + HALF_DIM, mask=is_stored), mask=is_stored)


def rotary_and_store_kv_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """Launch `rotary.rotary_and_store_kv`; arguments as there, unchecked."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    q_out = torch.empty(num_tokens, num_heads, head_dim, dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return q_out
    _rotary_and_store_kv_kernel[(num_tokens,)](
        q,
        k,
        v,
        q_out,
        k_cache,
        v_cache,
        positions,
        slot_mapping,
        cos_sin,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        num_heads,
        num_kv_heads,
        block_size,
        HEAD_DIM=head_dim,
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
        BLOCK_HEADS=triton.next_power_of_2(num_heads),
        BLOCK_KV_HEADS=triton.next_power_of_2(num_kv_heads),
        LETS_NEXT_BEGIN=decode_attention.BEGIN_EARLY and decode_attention.is_hopper(q.device),
        num_warps=4,
    )
    return q_out
