"""Triton SiLU-and-multiply: one program per row and block of columns."""

# Kernel parameters are typed by Triton, constexprs are capitals by its custom.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl

_MAX_BLOCK_COLUMNS = 2048


@triton.jit
def _silu_and_multiply_kernel(
    gate_up_ptr, out_ptr, row_stride, intermediate, CHUNK: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_inside = columns < intermediate
    if CHUNK == 0:
        gate_columns, distance = columns, intermediate
    else:
        gate_columns, distance = columns // CHUNK * (2 * CHUNK) + columns % CHUNK, CHUNK
    gate_ptrs = gate_up_ptr + row * row_stride + gate_columns
    gate = tl.load(gate_ptrs, mask=is_inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + distance, mask=is_inside, other=0.0).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(out_ptr.dtype.element_ty)  # rounded here, as torch does
    out = (activated.to(tl.float32) * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * intermediate + columns, out, mask=is_inside)


def silu_and_multiply_triton(gate_up: torch.Tensor, chunk: int = 0) -> torch.Tensor:
    """Launch `silu_and_multiply.silu_and_multiply`; arguments as there, unchecked.

    chunk: so many columns of the gate come before as many of the up projection, in turn; 0: all of the gate first.
    """
    num_tokens, intermediate = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_tokens, intermediate, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel() == 0:
        return out
    block_columns = min(_MAX_BLOCK_COLUMNS, triton.next_power_of_2(intermediate))
    grid = (num_tokens, triton.cdiv(intermediate, block_columns))
    _silu_and_multiply_kernel[grid](
        gate_up, out, gate_up.stride(0), intermediate, CHUNK=chunk, BLOCK_COLUMNS=block_columns, num_warps=4
    )
    return out
