"""The Triton decode attention against its twin in float32."""

from __future__ import annotations

import pytest
import torch

from blendserve_kernels import reference
from blendserve_kernels.decode_attention import decode_attention
from blendserve_kernels.shared_prefix_attention import shared_prefix_decode_attention
from blendserve_kernels.triton_kernels.decode_attention import (
    LaunchShape,
    choose_decode_shape,
    choose_launch_shape,
    decode_attention_triton,
    plan_decode_triton,
    rows_of_group,
)
from blendserve_kernels.triton_kernels.shared_prefix_attention import shared_prefix_decode_attention_triton
from tests.kernels.paged_requests import ATTENTION_TOLERANCE, HALF_DTYPES, make_paged_requests

CONTEXT_LENS = [1, 63, 0, 130, 16]


def check_decode_attention(
    context_lens: list[int],
    *,
    group_size: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    num_programs: int | None = None,
    num_launches: int = 1,
    use_tma: bool | None = None,
    device: torch.device,
) -> None:
    requests = make_paged_requests(
        context_lens, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size, dtype=dtype, device=device
    )
    num_heads = num_kv_heads * group_size
    q = torch.randn(len(context_lens), num_heads, head_dim, device=device).to(dtype)
    shape = choose_decode_shape(requests.k_cache, group_size, num_programs)
    if use_tma is not None:
        shape = choose_launch_shape(requests.k_cache, rows_of_group(group_size), num_programs, use_tma)
    table, lens, scale = requests.block_table, requests.context_lens, head_dim**-0.5
    plan = plan_decode_triton(requests.k_cache, table, lens, num_heads, shape=shape)
    expected = reference.decode_attention(
        q.float(), requests.k_cache.float(), requests.v_cache.float(), table, lens, scale
    )
    for _ in range(num_launches):
        out = decode_attention_triton(q, requests.k_cache, requests.v_cache, table, lens, scale, plan=plan)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), expected, atol=ATTENTION_TOLERANCE[dtype], rtol=1e-2)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group_size", [1, 3, 4, 7, 8])
def test_decode_attention_of_group_and_head_sizes(group_size: int, head_dim: int, device: torch.device) -> None:
    check_decode_attention(CONTEXT_LENS, group_size=group_size, head_dim=head_dim, device=device)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("block_size", [16, 64, 128])
def test_decode_attention_of_dtypes_and_block_sizes(dtype: torch.dtype, block_size: int, device: torch.device) -> None:
    check_decode_attention([1, 300, 64, 129], head_dim=128, block_size=block_size, dtype=dtype, device=device)


@pytest.mark.parametrize("use_tma", [False, True])
@pytest.mark.parametrize("num_programs", [1, 2, 3, 7, 64])
def test_decode_attention_cut_into_programs(num_programs: int, use_tma: bool, device: torch.device) -> None:
    check_decode_attention(CONTEXT_LENS, block_size=32, num_programs=num_programs, use_tma=use_tma, device=device)


@pytest.mark.parametrize("context_lens", [CONTEXT_LENS, [700], [64] * 9, [0, 0, 129]])
@pytest.mark.parametrize("num_programs", [1, 3, 32])
def test_decode_attention_of_half_precision_cut_into_programs(
    num_programs: int, context_lens: list[int], device: torch.device
) -> None:
    check_decode_attention(
        context_lens,
        head_dim=128,
        block_size=64,
        dtype=HALF_DTYPES[-1],
        num_programs=num_programs,
        num_launches=2,
        device=device,
    )


@pytest.mark.parametrize("use_tma", [False, True])
def test_decode_attention_of_one_long_request(use_tma: bool, device: torch.device) -> None:
    # The second launch finds the counters of the plan as the first one left them.
    check_decode_attention(
        [700], num_kv_heads=1, block_size=64, num_programs=9, num_launches=2, use_tma=use_tma, device=device
    )


@pytest.mark.parametrize(
    ("context_lens", "num_programs", "num_parts"),
    [
        ([128] * 16, 17, 32),  # 64 tiles, 2 an item: 32 parts of one item rather than 34 of 1 or 2 tiles
        ([128] * 15 + [100], 17, 32),  # as many tiles
        ([128] * 15 + [10], 17, 34),
        ([128] * 16, 25, 50),
        ([0], 4, 2),
    ],
)
def test_parts_of_items_of_one_length_hold_whole_ones(
    context_lens: list[int], num_programs: int, num_parts: int, device: torch.device
) -> None:
    lens = torch.tensor(context_lens, dtype=torch.int32, device=device)
    cache, table = torch.zeros(3, 2, 64, 64, device=device), torch.zeros(16, 2, dtype=torch.int32, device=device)
    shape = LaunchShape(True, 64, 0, 4, num_programs, is_for_hopper=True)
    plan = plan_decode_triton(cache, table, lens, 8, shape=shape)
    total = 2 * sum(max(1, -(-length // 64)) for length in context_lens)
    assert plan.list_length.tolist() == [total // 2, num_parts]
    begins, ends = plan.parts[:num_parts, 0].tolist(), plan.parts[:num_parts, 1].tolist()
    assert begins == [0, *ends[:-1]]
    assert ends[-1] == total
    assert torch.all(plan.parts[num_parts:, 0] == plan.parts[num_parts:, 1])


def test_decode_attention_of_empty_contexts(device: torch.device) -> None:
    check_decode_attention([0, 0, 0], device=device)


def test_decode_attention_refuses_descriptors_over_tiles_that_cross_blocks(device: torch.device) -> None:
    k_cache = torch.zeros(3, 1, 24, 64, device=device)
    with pytest.raises(ValueError, match=r"Invalid shape of k_cache: tensor descriptors can't tile \[3, 1, 24, 64\]"):
        choose_launch_shape(k_cache, 16, use_tma=True)


def test_decode_attention_refuses_a_head_dim_that_is_no_power_of_two(device: torch.device) -> None:
    cache = torch.zeros(3, 1, 16, 80, device=device)
    table, lens = torch.zeros(1, 1, dtype=torch.int32, device=device), torch.ones(1, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"expected head_dim 16, 32, 64, 128 or 256, got 80"):
        decode_attention_triton(torch.zeros(1, 2, 80, device=device), cache, cache, table, lens, 1.0)


def test_decode_attention_writes_the_rows_that_it_is_given(device: torch.device) -> None:
    requests = make_paged_requests(
        [40, 0, 3, 0], num_kv_heads=2, head_dim=64, block_size=16, dtype=torch.float32, device=device
    )
    q = torch.randn(4, 8, 64, device=device)
    arguments = (q, requests.k_cache, requests.v_cache, requests.block_table, requests.context_lens, 0.125)
    expected = reference.decode_attention(*arguments)
    none = torch.zeros(0, dtype=torch.int32, device=device)
    shared = (*arguments[:5], torch.zeros_like(requests.context_lens), none, none, 0.125)
    runs = [(decode_attention_triton, arguments), (decode_attention, arguments)]
    runs += [(shared_prefix_decode_attention_triton, shared), (shared_prefix_decode_attention, shared)]
    for run, given in runs:
        buffer = torch.full((9, 8, 64), 8.0, device=device)
        assert run(*given, out=buffer[:4]).data_ptr() == buffer.data_ptr()
        torch.testing.assert_close(buffer[:4], expected, atol=2e-5, rtol=0)
        assert torch.all(buffer[4:] == 8.0)
        assert torch.all(buffer[1] == 0.0)
