"""The first half of the MLP in one op: silu(x @ gate.T) * (x @ up.T), with both projections in one weight."""

from __future__ import annotations

import torch

from blendserve_kernels import reference
from blendserve_kernels.argument_checks import (
    check_dtype,
    check_inner_contiguous,
    check_rank,
    check_same_device,
    check_shape,
)

CHUNK = 8  # rows of one projection before those of the other


def interleave_gate_up(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return the weight [2 * intermediate, hidden] that the op takes: 8 rows of gate, the same 8 of up, and so on.

    gate, up: [intermediate, hidden], intermediate a multiple of 8.
    """
    check_rank("gate", gate, "[intermediate, hidden]")
    check_shape("up", up, gate.shape)
    if gate.shape[0] % CHUNK:
        raise ValueError(f"Invalid shape of gate: expected a multiple of {CHUNK} rows, got {list(gate.shape)}")
    chunks = [weight.reshape(-1, 1, CHUNK, weight.shape[1]) for weight in (gate, up)]
    return torch.cat(chunks, dim=1).reshape(2 * gate.shape[0], gate.shape[1])


def linear_silu_and_multiply(x: torch.Tensor, weight: torch.Tensor, num_programs: int | None = None) -> torch.Tensor:
    """Return silu(x @ gate.T) * (x @ up.T), [num_tokens, intermediate], contiguous.

    x: [num_tokens, hidden]. weight: [2 * intermediate, hidden] as `interleave_gate_up` makes it, contiguous.
    num_programs: how many SMs the fused kernel may take, all by default; ignored where cuBLAS does the product.
    """
    check_rank("x", x, "[num_tokens, hidden]")
    check_shape("weight", weight, [weight.shape[0], x.shape[1]])
    if weight.shape[0] % (2 * CHUNK):
        raise ValueError(f"Invalid shape of weight: expected a multiple of {2 * CHUNK} rows, got {list(weight.shape)}")
    check_dtype("weight", weight, x.dtype)
    check_same_device("x", x, weight=weight)
    check_inner_contiguous("x", x, 1)
    check_inner_contiguous("weight", weight, 2)
    if x.is_cuda:
        from blendserve_kernels.triton_kernels.linear_silu_and_multiply import linear_silu_and_multiply_triton

        return linear_silu_and_multiply_triton(x, weight, num_programs)
    return reference.linear_silu_and_multiply(x, weight)
