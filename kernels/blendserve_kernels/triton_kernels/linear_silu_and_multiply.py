"""Launches the gated half of the MLP: fused on Hopper where that is faster, else cuBLAS and an activation behind it."""

from __future__ import annotations

import torch

from blendserve_kernels.linear_silu_and_multiply import CHUNK
from blendserve_kernels.triton_kernels.decode_attention import device_limits
from blendserve_kernels.triton_kernels.linear import fits_hopper_kernel
from blendserve_kernels.triton_kernels.silu_and_multiply import silu_and_multiply_triton

# From 256 to 384 tokens and from 768 on; elsewhere cuBLAS has better tiles, by as much as the activation costs.
_FUSED_TOKENS = ((256, 384), (768, 1 << 30))


def linear_silu_and_multiply_triton(
    x: torch.Tensor, weight: torch.Tensor, num_programs: int | None = None
) -> torch.Tensor:
    """Launch `linear_silu_and_multiply.linear_silu_and_multiply`; arguments as there, unchecked. No host sync."""
    is_faster = any(first <= x.shape[0] <= last for first, last in _FUSED_TOKENS)
    if not is_faster or not fits_hopper_kernel(weight):
        return silu_and_multiply_triton(torch.nn.functional.linear(x, weight), CHUNK)
    from blendserve_kernels.gluon_kernels import linear

    out = torch.empty(x.shape[0], weight.shape[0] // 2, dtype=x.dtype, device=x.device)
    linear.launch(x, weight, out, True, num_programs or device_limits(x.device)[0])
    return out
