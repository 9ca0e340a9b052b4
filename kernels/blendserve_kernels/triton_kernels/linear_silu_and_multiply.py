"""Launches the gated half of the MLP: fused on Hopper where that is faster, else cuBLAS and an activation behind it."""

# Kernel parameters are typed by Triton, constexprs are capitals by its custom.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl

from blendserve_kernels.triton_kernels.decode_attention import device_limits
from blendserve_kernels.triton_kernels.linear import fits_hopper_kernel

_MAX_BLOCK_COLUMNS = 2048
# From 256 to 384 tokens and from 768 on; elsewhere cuBLAS has better tiles, by as much as the activation costs.
_FUSED_TOKENS = ((256, 384), (768, 1 << 30))


@triton.jit
def _silu_and_multiply_chunks_kernel(gate_up_ptr, out_ptr, intermediate, BLOCK_COLUMNS: tl.constexpr):
    """Chunks of 8 gates and 8 ups, in turn."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_inside = columns < intermediate
    gate_ptrs = gate_up_ptr + row * 2 * intermediate + columns // 8 * 16 + columns % 8
    gate = tl.load(gate_ptrs, mask=is_inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + 8, mask=is_inside, other=0.0).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(out_ptr.dtype.element_ty)  # rounded here, as torch does
    out = (activated.to(tl.float32) * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * intermediate + columns, out, mask=is_inside)


def silu_and_multiply_chunks_triton(gate_up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up of contiguous gate_up [num_tokens, 2 * intermediate], whose columns alternate by 8."""
    num_tokens, intermediate = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_tokens, intermediate, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel() == 0:
        return out
    block_columns = min(_MAX_BLOCK_COLUMNS, triton.next_power_of_2(intermediate))
    grid = (num_tokens, triton.cdiv(intermediate, block_columns))
    _silu_and_multiply_chunks_kernel[grid](gate_up, out, intermediate, BLOCK_COLUMNS=block_columns, num_warps=4)
    return out


def linear_silu_and_multiply_triton(
    x: torch.Tensor, weight: torch.Tensor, num_programs: int | None = None
) -> torch.Tensor:
    """Launch `linear_silu_and_multiply.linear_silu_and_multiply`; arguments as there, unchecked. No host sync."""
    is_faster = any(first <= x.shape[0] <= last for first, last in _FUSED_TOKENS)
    if not is_faster or not fits_hopper_kernel(weight):
        return silu_and_multiply_chunks_triton(torch.nn.functional.linear(x, weight))
    from blendserve_kernels.gluon_kernels import linear

    out = torch.empty(x.shape[0], weight.shape[0] // 2, dtype=x.dtype, device=x.device)
    linear.launch(x, weight, out, True, num_programs or device_limits(x.device)[0])
    return out
