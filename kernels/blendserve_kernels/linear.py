"""The product of a batch with a weight: its rows independent of one another, bit for bit, or on some of the SMs."""

from __future__ import annotations

import torch

from blendserve_kernels.argument_checks import (
    check_dtype,
    check_inner_contiguous,
    check_rank,
    check_same_device,
    check_shape,
)


def can_limit_programs(weight: torch.Tensor) -> bool:
    """Return whether a product with `weight`, [num_out, num_in], can be held to some of the device's SMs."""
    if not weight.is_cuda:
        return False
    from blendserve_kernels.triton_kernels.linear import fits_hopper_kernel

    return fits_hopper_kernel(weight)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    num_programs: int | None = None,
    *,
    is_batch_invariant: bool = True,
) -> torch.Tensor:
    """Return x @ weight.T + bias, [num_tokens, num_out], each row bitwise the same whatever the other rows are.

    x: [num_tokens, num_in]. weight: [num_out, num_in], contiguous. bias: [num_out]. On a GPU every size runs the same
    tiles in the same order; on the CPU the product is torch's, which promises no such thing.
    num_programs: how many SMs the kernel for Hopper may take, all by default.
    is_batch_invariant: without it, that kernel may cut tiles along K, by their number, so that no SM idles.
    """
    check_rank("x", x, "[num_tokens, num_in]")
    check_shape("weight", weight, [weight.shape[0], x.shape[1]])
    check_dtype("weight", weight, x.dtype)
    check_same_device("x", x, weight=weight)
    check_inner_contiguous("x", x, 1)
    check_inner_contiguous("weight", weight, 2)
    if bias is not None:
        check_shape("bias", bias, [weight.shape[0]])
        check_dtype("bias", bias, x.dtype)
        check_same_device("x", x, bias=bias)
    if not x.is_cuda:
        return torch.nn.functional.linear(x, weight, bias)
    from blendserve_kernels.triton_kernels.linear import linear_triton

    return linear_triton(x, weight, bias, num_programs, can_split=not is_batch_invariant)
