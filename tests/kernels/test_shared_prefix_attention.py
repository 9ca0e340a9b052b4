"""The Triton shared-prefix decode attention against the decode twin, which reads every prefix for every request."""

from __future__ import annotations

import itertools

import pytest
import torch

from blendserve_kernels import reference
from blendserve_kernels.shared_prefix_attention import plan_shared_prefix, shared_prefix_decode_attention
from blendserve_kernels.triton_kernels import decode_attention, prefill_attention
from blendserve_kernels.triton_kernels.shared_prefix_attention import (
    SplitPrefixPlan,
    plan_shared_prefix_triton,
    plan_splits,
    shared_prefix_decode_attention_triton,
)
from tests.kernels.paged_requests import ATTENTION_TOLERANCE, HALF_DTYPES, make_paged_requests


@pytest.mark.parametrize(
    ("group_size", "head_dim", "block_size", "dtype", "num_programs"),
    [
        (1, 64, 16, torch.float32, None),
        (3, 128, 32, torch.float32, 3),
        (7, 64, 32, torch.float32, 11),
        (4, 128, 64, HALF_DTYPES[-1], None),
        (8, 128, 128, torch.float16, 2),
    ],
)
def test_shared_prefix_decode_attention(
    group_size: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    num_programs: int | None,
    device: torch.device,
) -> None:
    prefix_len = 2 * block_size
    # Requests 1 to 3 and 5 to 15 share their prefix, 0 and 4 have none; the last group is a padding row.
    context_lens = [5, *(prefix_len + n for n in (1, 20, block_size)), 40, *(prefix_len + n for n in range(1, 12))]
    requests = make_paged_requests(
        context_lens,
        num_kv_heads=2,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        device=device,
        num_shared_tokens=prefix_len,
    )
    prefix_lens = torch.tensor([0, *[prefix_len] * 3, 0, *[prefix_len] * 11], dtype=torch.int32, device=device)
    groups = torch.tensor([[1, 5, 0], [3, 11, 0]], dtype=torch.int32, device=device)
    q = torch.randn(len(context_lens), 2 * group_size, head_dim, device=device).to(dtype)
    table, lens, scale = requests.block_table, requests.context_lens, head_dim**-0.5
    out = shared_prefix_decode_attention_triton(
        q, requests.k_cache, requests.v_cache, table, lens, prefix_lens, groups[0], groups[1], scale, num_programs
    )
    expected = reference.decode_attention(
        q.float(), requests.k_cache.float(), requests.v_cache.float(), table, lens, scale
    )
    torch.testing.assert_close(out.float(), expected, atol=ATTENTION_TOLERANCE[dtype], rtol=1e-2)


def test_shared_prefix_decode_attention_without_groups_is_plain_decode(device: torch.device) -> None:
    requests = make_paged_requests(
        [3, 40], num_kv_heads=1, head_dim=64, block_size=16, dtype=torch.float32, device=device
    )
    q, none = torch.randn(2, 4, 64, device=device), torch.zeros(0, dtype=torch.int32, device=device)
    table, lens = requests.block_table, requests.context_lens
    arguments = (q, requests.k_cache, requests.v_cache, table, lens, torch.zeros_like(lens), none, none, 0.125)
    expected = reference.decode_attention(q, requests.k_cache, requests.v_cache, table, lens, 0.125)
    for launch in (shared_prefix_decode_attention_triton, shared_prefix_decode_attention):
        torch.testing.assert_close(launch(*arguments), expected, atol=2e-5, rtol=0)


def test_split_plan_lists_every_block_of_every_group(device: torch.device) -> None:
    # Two groups over prefixes of 10 and 3 tiles, one of them larger than a query block, a padding group between. Three
    # blocks for each of two KV heads: 48 programs take eight splits of all of them, 13 take two.
    prefix_lens = torch.tensor([1280] * 40 + [0] + [384] * 5, dtype=torch.int32, device=device)
    starts, sizes = (torch.tensor(n, dtype=torch.int32, device=device) for n in ([0, 0, 41], [40, 0, 5]))
    any_position = 1 << 30
    for num_programs, num_splits in ((48, 8), (13, 2), (1, 1)):
        plan = plan_splits(prefix_lens, starts, sizes, num_heads=8, num_kv_heads=2, num_programs=num_programs)
        expected = []
        for first, rows, start, num_tiles in ((0, 32, 0, 10), (32, 8, 0, 10), (41, 5, 41, 3)):
            count = min(num_splits, num_tiles)
            bounds = [num_tiles * split // count for split in range(count + 1)]
            expected += [
                [first, rows, any_position, end - begin, start, any_position, begin, split]
                for split, (begin, end) in enumerate(itertools.pairwise(bounds))
            ]
        assert plan.pack == 4
        assert plan.block_list[: int(plan.list_length)].tolist() == expected
        assert plan.lse.shape == (8, 46, 8)
        assert torch.all(plan.lse == -torch.inf)
        assert plan.sync.tolist() == [0]


@pytest.mark.parametrize(("block_size", "is_for_hopper"), [(128, True), (64, False)])
def test_programs_that_wait_for_one_another_are_no_more_than_run_at_once(
    block_size: int, is_for_hopper: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (decode_attention, prefill_attention):
        monkeypatch.setattr(module, "is_hopper", lambda _device: True)
    cache = torch.empty(8, 2, block_size, 64, dtype=torch.float16, device=device)
    table = torch.arange(8, dtype=torch.int32, device=device).view(2, 4)
    prefixes, one = torch.full_like(table[:, 0], block_size), torch.ones(1, dtype=torch.int32, device=device)
    plan = plan_shared_prefix_triton(cache, table, 2 * prefixes, prefixes, 0 * one, 2 * one, 8, num_programs=1000)
    num_sms = decode_attention.device_limits(device)[0]
    assert isinstance(plan.prefix, SplitPrefixPlan) == plan.suffix.shape.is_for_hopper == is_for_hopper
    assert plan.suffix.shape.num_programs == (num_sms if is_for_hopper else 1000)


def test_shared_prefix_decode_attention_of_a_group_larger_than_a_query_block(device: torch.device) -> None:
    context_lens = [200, *[256 + 1 + n for n in range(35)], 128]
    requests = make_paged_requests(
        context_lens,
        num_kv_heads=2,
        head_dim=64,
        block_size=128,
        dtype=HALF_DTYPES[-1],
        device=device,
        num_shared_tokens=256,
    )
    prefix_lens = torch.tensor([0, *[256] * 35, 0], dtype=torch.int32, device=device)
    starts, sizes = (torch.tensor(n, dtype=torch.int32, device=device) for n in ([1, 0], [35, 0]))
    q = torch.randn(37, 8, 64, device=device).to(HALF_DTYPES[-1])
    arguments = (q, requests.k_cache, requests.v_cache, requests.block_table, requests.context_lens)
    plan = plan_shared_prefix(requests.k_cache, *arguments[3:], prefix_lens, starts, sizes, 8)
    expected = reference.decode_attention(*(x.float() for x in arguments[:3]), *arguments[3:], 0.125)
    for _ in range(2):  # layers share the plan
        out = shared_prefix_decode_attention_triton(*arguments, prefix_lens, starts, sizes, 0.125, plan=plan)
        torch.testing.assert_close(out.float(), expected, atol=ATTENTION_TOLERANCE[q.dtype], rtol=1e-2)
