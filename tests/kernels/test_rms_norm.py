"""The Triton RMSNorm against its twin."""

from __future__ import annotations

import pytest
import torch

from blendserve_kernels import reference
from blendserve_kernels.triton_kernels.rms_norm import add_rms_norm_triton, rms_norm_triton

# Two rounding steps, relative: the interpreter cuts bfloat16 off where a GPU rounds.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("num_rows", "hidden"), [(1, 576), (63, 64), (1000, 128), (5, 4096), (3, 1000)])
def test_rms_norm(num_rows: int, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(num_rows, hidden, device=device).to(dtype)
    weight = torch.randn(hidden, device=device).to(dtype)
    out = rms_norm_triton(x, weight, 1e-5)
    assert out.dtype == dtype
    torch.testing.assert_close(out, reference.rms_norm(x, weight, 1e-5), atol=1e-5, rtol=2 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("num_rows", "hidden"), [(1, 576), (63, 2048), (17, 96)])
def test_add_rms_norm(num_rows: int, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
    wide = torch.randn(2, num_rows, hidden + 32, device=device).to(dtype)
    x, residual = wide[:, :, :hidden]  # rows apart
    weight = torch.randn(hidden, device=device).to(dtype)
    before = wide.clone()
    out, residual_out = add_rms_norm_triton(x, residual, weight, 1e-6)
    expected, expected_residual = reference.add_rms_norm(x, residual, weight, 1e-6)
    torch.testing.assert_close(residual_out, expected_residual, atol=1e-6, rtol=TOLERANCE[dtype])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=2 * TOLERANCE[dtype])
    assert torch.equal(wide, before)


def test_rms_norm_of_no_rows(device: torch.device) -> None:
    assert rms_norm_triton(torch.empty(0, 64, device=device), torch.ones(64, device=device), 1e-5).shape == (0, 64)
