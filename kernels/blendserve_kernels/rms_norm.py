"""Root-mean-square layer norm, alone or with the residual addition before it.

Rounds where transformers' LlamaRMSNorm rounds: statistics in float32, the normalised row cast to the input dtype, then
the weight.
"""

from __future__ import annotations

import torch

from blendserve_kernels import reference
from blendserve_kernels.argument_checks import check_inner_contiguous, check_rank, check_same_device, check_shape


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    check_rank("x", x, "[num_rows, hidden]")
    check_shape("weight", weight, [x.shape[1]])
    check_same_device("x", x, weight=weight)
    check_inner_contiguous("x", x, 1)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight.

    x: [num_rows, hidden], rows may be strided. weight: [hidden]. Result: [num_rows, hidden], contiguous, dtype of x.
    """
    _check(x, weight)
    if x.is_cuda:
        from blendserve_kernels.triton_kernels.rms_norm import rms_norm_triton

        return rms_norm_triton(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (rms_norm(x + residual), x + residual); the sum is rounded to the dtype of x before it is normalised.

    x, residual: [num_rows, hidden]. weight: [hidden]. Neither input is written.
    """
    _check(x, weight)
    check_shape("residual", residual, x.shape)
    check_same_device("x", x, residual=residual)
    check_inner_contiguous("residual", residual, 1)
    if x.is_cuda:
        from blendserve_kernels.triton_kernels.rms_norm import add_rms_norm_triton

        return add_rms_norm_triton(x, residual, weight, eps)
    return reference.add_rms_norm(x, residual, weight, eps)
