"""What tensor descriptors ask of the tensors that they describe."""

from __future__ import annotations

import torch


def aligned(x: torch.Tensor) -> torch.Tensor:
    """Return x, or a dense copy where its rows don't begin at multiples of 16 bytes."""
    if x.data_ptr() % 16 or x.stride(0) * x.element_size() % 16:
        return x.clone(memory_format=torch.contiguous_format)
    return x
