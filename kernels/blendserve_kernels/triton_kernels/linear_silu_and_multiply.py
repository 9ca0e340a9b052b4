"""Launches the gated half of the MLP: fused on Hopper where that is faster, else cuBLAS and an activation behind it."""

from __future__ import annotations

import torch

from blendserve_kernels.linear_silu_and_multiply import CHUNK
from blendserve_kernels.triton_kernels.decode_attention import device_limits
from blendserve_kernels.triton_kernels.linear import fits_hopper_kernel
from blendserve_kernels.triton_kernels.silu_and_multiply import silu_and_multiply_triton

_FUSED_TOKENS = 256  # from here on; below cuBLAS has better tiles, by as much as the activation costs
_CUT_TOKENS = range(385, 769)  # where the last round of whole tiles would leave many SMs idle


def linear_silu_and_multiply_triton(
    x: torch.Tensor, weight: torch.Tensor, num_programs: int | None = None
) -> torch.Tensor:
    """Launch `linear_silu_and_multiply.linear_silu_and_multiply`; arguments as there, unchecked. No host sync."""
    is_faster = x.shape[0] >= _FUSED_TOKENS or num_programs is not None
    if not is_faster or not fits_hopper_kernel(weight):
        return silu_and_multiply_triton(torch.nn.functional.linear(x, weight), CHUNK)
    from blendserve_kernels.gluon_kernels import linear

    out = torch.empty(x.shape[0], weight.shape[0] // 2, dtype=x.dtype, device=x.device)
    can_split = x.shape[0] in _CUT_TOKENS or num_programs is not None
    linear.launch(x, weight, out, True, num_programs or device_limits(x.device)[0], can_split=can_split)
    return out
