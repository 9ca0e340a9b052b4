"""Triton RMSNorm, with and without the residual addition: one pass over the row, several short rows to a program."""

# Kernel parameters are typed by Triton, constexprs are capitals by its custom.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl

_MAX_BLOCK_ELEMENTS = 4096  # rows shorter than this share a program
_MAX_HIDDEN = 65536


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    residual_out_ptr,
    num_rows,
    x_row_stride,
    residual_row_stride,
    hidden,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    rows = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK_HIDDEN)[None, :]
    is_inside = (rows < num_rows) & (columns < hidden)
    x = tl.load(x_ptr + rows * x_row_stride + columns, mask=is_inside, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + rows * residual_row_stride + columns, mask=is_inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(residual_out_ptr + rows * hidden + columns, x, mask=is_inside)
    x_float = x.to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(x_float * x_float, axis=1) / hidden + eps)
    normalized = (x_float * inverse_rms[:, None]).to(x_ptr.dtype.element_ty)
    weight = tl.load(weight_ptr + columns, mask=columns < hidden, other=0.0)
    out = weight.to(tl.float32) * normalized.to(tl.float32)
    tl.store(out_ptr + rows * hidden + columns, out.to(out_ptr.dtype.element_ty), mask=is_inside)


def _launch(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows, hidden = x.shape
    if hidden > _MAX_HIDDEN:
        raise ValueError(f"Invalid shape of x: expected at most {_MAX_HIDDEN} columns, got {list(x.shape)}")
    out = torch.empty(num_rows, hidden, dtype=x.dtype, device=x.device)
    residual_out = out if residual is None else torch.empty_like(out)
    if num_rows == 0:
        return out, residual_out
    block_hidden = triton.next_power_of_2(hidden)
    block_rows = max(1, _MAX_BLOCK_ELEMENTS // block_hidden)  # whatever num_rows is: a row's sum keeps its order
    residual_in = x if residual is None else residual
    _rms_norm_kernel[(triton.cdiv(num_rows, block_rows),)](
        x,
        residual_in,
        weight,
        out,
        residual_out,
        num_rows,
        x.stride(0),
        residual_in.stride(0),
        hidden,
        eps,
        HAS_RESIDUAL=residual is not None,
        BLOCK_ROWS=block_rows,
        BLOCK_HIDDEN=block_hidden,
        num_warps=min(16, max(4, block_rows * block_hidden // 1024)),
    )
    return out, residual_out


def rms_norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Launch `rms_norm.rms_norm`; arguments as there, unchecked."""
    return _launch(x, None, weight, eps)[0]


def add_rms_norm_triton(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch `rms_norm.add_rms_norm`; arguments as there, unchecked."""
    return _launch(x, residual, weight, eps)
