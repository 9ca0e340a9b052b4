"""The product against torch's in float64, and each row's independence from the others."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from blendserve_kernels import reference
from blendserve_kernels.gluon_kernels import linear as linear_kernel
from blendserve_kernels.linear import linear
from blendserve_kernels.triton_kernels.linear import linear_triton
from tests.kernels.gluon_emulation import emulated
from tests.kernels.paged_requests import HALF_DTYPES

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES])
@pytest.mark.parametrize(("num_tokens", "num_in", "num_out"), [(1, 40, 33), (130, 72, 200), (300, 1600, 512)])
def test_linear(num_tokens: int, num_in: int, num_out: int, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(num_tokens, num_in + 8, device=device).to(dtype)[:, 8:]  # rows apart
    weight = (torch.randn(num_out, num_in, device=device) / num_in**0.5).to(dtype)
    bias = torch.randn(num_out, device=device).to(dtype)
    expected = x.double() @ weight.double().t()
    cut = partial(linear, num_programs=3, is_batch_invariant=False)
    for run in (linear, linear_triton, cut):
        for given in (None, bias):
            out = run(x, weight, given)
            assert out.dtype == dtype
            whole = expected if given is None else expected + given.double()
            torch.testing.assert_close(out.double(), whole, atol=TOLERANCE[dtype], rtol=1e-2)


@pytest.mark.parametrize("num_out", [200, 256])
def test_rows_of_linear_do_not_depend_on_the_batch(num_out: int, device: torch.device) -> None:
    x = torch.randn(150, 192, device=device).half()
    weight = torch.randn(num_out, 192, device=device).half()
    whole = linear_triton(x, weight, None)
    for rows in (slice(0, 1), slice(149, 150), slice(3, 140)):
        assert torch.equal(linear_triton(x[rows].contiguous(), weight, None), whole[rows])


@pytest.mark.parametrize(
    ("num_tokens", "num_in", "num_out", "num_programs"), [(130, 1600, 768, 4), (20, 1600, 512, 5), (300, 1600, 512, 4)]
)
@pytest.mark.parametrize("is_fused", [False, True])
def test_cut_tiles_add_up(
    num_tokens: int, num_in: int, num_out: int, num_programs: int, is_fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = emulated("linear", monkeypatch)
    num_tiles = -(-num_tokens // kernel.TILE_M) * num_out // kernel.TILE_N
    num_whole, num_splits = kernel.choose_splits(num_tiles, num_in // kernel.TILE_K, num_programs)
    assert num_whole % num_programs == 0
    assert (num_tiles - num_whole) * num_splits > 1
    x, weight = torch.randn(num_tokens, num_in).half(), (torch.randn(num_out, num_in) / num_in**0.5).half()
    expected = x.float() @ weight.float().t()
    if is_fused:
        expected = reference.linear_silu_and_multiply(x.float(), weight.float())
    for _ in range(2):  # the second launch finds the counters as the first one left them
        out = torch.full_like(expected, torch.nan).half()
        kernel.launch(x, weight, out, is_fused, num_programs, can_split=True)
        torch.testing.assert_close(out.float(), expected, atol=4e-3, rtol=1e-2)


def test_splits_fill_the_last_round() -> None:
    # The four projections of an 8B model at 512 tokens on 96 programs: 96, 64, 448 and 64 tiles.
    assert linear_kernel.choose_splits(96, 64, 96) == (96, 1)
    assert linear_kernel.choose_splits(64, 64, 96) == (0, 3)
    assert linear_kernel.choose_splits(448, 64, 96) == (384, 3)
    assert linear_kernel.choose_splits(64, 224, 96) == (0, 3)


def test_linear_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"Invalid shape of weight: expected \[8, 4\], got \[8, 5\]"):
        linear(torch.zeros(2, 4), torch.zeros(8, 5))
    with pytest.raises(ValueError, match=r"Invalid shape of bias: expected \[8\], got \[4\]"):
        linear(torch.zeros(2, 4), torch.zeros(8, 4), torch.zeros(4))
