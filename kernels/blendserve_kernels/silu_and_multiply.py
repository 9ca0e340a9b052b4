"""The gated activation of the MLP: silu(gate) * up."""

from __future__ import annotations

import torch

from blendserve_kernels import reference
from blendserve_kernels.argument_checks import check_inner_contiguous, check_rank


def silu_and_multiply(gate_up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up, where gate_up [num_tokens, 2 * intermediate] holds the gate, then the up projection.

    Result: [num_tokens, intermediate], contiguous.
    """
    check_rank("gate_up", gate_up, "[num_tokens, 2 * intermediate]")
    if gate_up.shape[1] % 2:
        raise ValueError(
            f"Invalid shape of gate_up: expected [num_tokens, 2 * intermediate], got {list(gate_up.shape)}"
        )
    check_inner_contiguous("gate_up", gate_up, 1)
    if gate_up.is_cuda:
        from blendserve_kernels.triton_kernels.silu_and_multiply import silu_and_multiply_triton

        return silu_and_multiply_triton(gate_up)
    return reference.silu_and_multiply(gate_up)
