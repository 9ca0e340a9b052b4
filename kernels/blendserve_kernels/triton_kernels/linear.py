"""Triton product of a batch with a weight, of one tile shape for every size; on Hopper the kernel of gluon_kernels."""

# Kernel parameters are typed by Triton, constexprs are capitals by its custom.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl

from blendserve_kernels.triton_kernels.decode_attention import device_limits, is_hopper


@triton.jit
def _linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_tokens,
    num_out,
    num_in,
    x_stride,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    row = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    column = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    accumulator = tl.zeros([TILE_M, TILE_N], dtype=tl.float32)
    for begin in tl.range(0, num_in, TILE_K):
        k = begin + tl.arange(0, TILE_K)
        x_mask = (row[:, None] < num_tokens) & (k[None, :] < num_in)
        x = tl.load(x_ptr + row[:, None].to(tl.int64) * x_stride + k[None, :], mask=x_mask, other=0.0)
        weight_mask = (column[:, None] < num_out) & (k[None, :] < num_in)
        weight_offsets = column[:, None].to(tl.int64) * num_in + k[None, :]
        weight = tl.load(weight_ptr + weight_offsets, mask=weight_mask, other=0.0)
        accumulator = tl.dot(x, tl.trans(weight), accumulator, input_precision=PRECISION)
    if HAS_BIAS:
        accumulator += tl.load(bias_ptr + column, mask=column < num_out, other=0.0).to(tl.float32)[None, :]
    out_mask = (row[:, None] < num_tokens) & (column[None, :] < num_out)
    out_offsets = row[:, None].to(tl.int64) * num_out + column[None, :]
    tl.store(out_ptr + out_offsets, accumulator.to(out_ptr.dtype.element_ty), mask=out_mask)


def fits_hopper_kernel(weight: torch.Tensor) -> bool:
    """Return whether `gluon_kernels.linear` runs on this GPU with this weight, whatever it is multiplied with."""
    return (
        is_hopper(weight.device)
        and weight.element_size() == 2
        and weight.shape[0] % 256 == 0
        and weight.shape[1] % 64 == 0
        and weight.data_ptr() % 16 == 0
    )


def linear_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    num_programs: int | None = None,
    *,
    can_split: bool = False,
) -> torch.Tensor:
    """Launch `linear.linear`; arguments as there, unchecked. No host sync: safe to capture."""
    num_tokens, num_in = x.shape
    num_out = weight.shape[0]
    out = torch.empty(num_tokens, num_out, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    if fits_hopper_kernel(weight):
        from blendserve_kernels.gluon_kernels import linear

        linear.launch(x, weight, out, False, num_programs or device_limits(x.device)[0], can_split=can_split)
        return out if bias is None else out.add_(bias)
    tile = 128 if x.element_size() == 2 else 64
    _linear_kernel[(triton.cdiv(num_tokens, tile), triton.cdiv(num_out, tile))](
        x,
        weight,
        out if bias is None else bias,
        out,
        num_tokens,
        num_out,
        num_in,
        x.stride(0),
        HAS_BIAS=bias is not None,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        TILE_M=tile,
        TILE_N=tile,
        TILE_K=64 if x.element_size() == 2 else 32,
        num_warps=8,
        num_stages=3,
    )
    return out
