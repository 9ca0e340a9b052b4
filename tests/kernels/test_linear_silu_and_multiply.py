"""The gated half of the MLP against its parts, spelled out."""

from __future__ import annotations

import pytest
import torch

from blendserve_kernels.linear_silu_and_multiply import CHUNK, interleave_gate_up, linear_silu_and_multiply
from blendserve_kernels.triton_kernels.linear_silu_and_multiply import linear_silu_and_multiply_triton
from blendserve_kernels.triton_kernels.silu_and_multiply import silu_and_multiply_triton
from tests.kernels.paged_requests import HALF_DTYPES

# The larger ones run fused on Hopper.
SIZES = [(1, 16, 8), (5, 64, 384)]
if torch.cuda.is_available():
    SIZES += [(300, 64, 128), (900, 128, 256), (769, 64, 128)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def _spelled_out(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gated, lifted = x.double() @ gate.double().t(), x.double() @ up.double().t()
    return gated * torch.sigmoid(gated) * lifted


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES])
@pytest.mark.parametrize(("num_tokens", "hidden", "intermediate"), SIZES)
def test_linear_silu_and_multiply(
    num_tokens: int, hidden: int, intermediate: int, dtype: torch.dtype, device: torch.device
) -> None:
    x = torch.randn(num_tokens, hidden, device=device).to(dtype)
    gate, up = ((torch.randn(intermediate, hidden, device=device) / hidden**0.5).to(dtype) for _ in range(2))
    weight = interleave_gate_up(gate, up)
    expected = _spelled_out(x, gate, up).float()
    for run in (linear_silu_and_multiply, linear_silu_and_multiply_triton):
        out = run(x, weight)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), expected, atol=TOLERANCE[dtype], rtol=1e-2)


def test_linear_silu_and_multiply_with_few_programs(device: torch.device) -> None:
    x = torch.randn(770, 64, device=device).half()
    gate, up = (torch.randn(256, 64, device=device).half() / 8 for _ in range(2))
    out = linear_silu_and_multiply(x, interleave_gate_up(gate, up), num_programs=3)
    torch.testing.assert_close(out.float(), _spelled_out(x, gate, up).float(), atol=1e-2, rtol=1e-2)


def test_silu_and_multiply_of_chunks_of_a_wide_row(device: torch.device) -> None:
    gate, up = torch.randn(3, 4104, device=device), torch.randn(3, 4104, device=device)
    chunks = torch.stack([gate.view(3, -1, 8), up.view(3, -1, 8)], dim=2).reshape(3, -1)
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(silu_and_multiply_triton(chunks, CHUNK), expected)


def test_interleaved_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Invalid shape of gate: expected a multiple of 8 rows, got \[9, 4\]"):
        interleave_gate_up(torch.zeros(9, 4), torch.zeros(9, 4))
    with pytest.raises(ValueError, match=r"Invalid shape of up: expected \[8, 4\], got \[8, 5\]"):
        interleave_gate_up(torch.zeros(8, 4), torch.zeros(8, 5))
    with pytest.raises(ValueError, match=r"Invalid shape of weight: expected a multiple of 16 rows, got \[8, 4\]"):
        linear_silu_and_multiply(torch.zeros(2, 4), torch.zeros(8, 4))
    with pytest.raises(TypeError, match=r"Invalid dtype of weight: expected torch\.float32, got torch\.float16"):
        linear_silu_and_multiply(torch.zeros(2, 4), torch.zeros(16, 4).half())
