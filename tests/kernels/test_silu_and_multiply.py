"""The Triton SiLU-and-multiply against its twin."""

from __future__ import annotations

import pytest
import torch

from blendserve_kernels import reference
from blendserve_kernels.triton_kernels.silu_and_multiply import silu_and_multiply_triton

# Two rounding steps, relative: the interpreter cuts bfloat16 off where a GPU rounds.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("num_tokens", "intermediate"), [(1, 1536), (63, 100), (2, 4099)])
def test_silu_and_multiply(num_tokens: int, intermediate: int, dtype: torch.dtype, device: torch.device) -> None:
    gate_up = (torch.randn(num_tokens, 2 * intermediate + 8, device=device) * 3).to(dtype)[:, 8:]  # rows apart
    out = silu_and_multiply_triton(gate_up)
    assert out.dtype == dtype
    torch.testing.assert_close(out, reference.silu_and_multiply(gate_up), atol=1e-5, rtol=2 * TOLERANCE[dtype])
