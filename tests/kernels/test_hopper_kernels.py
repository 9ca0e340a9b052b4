"""The kernels for Hopper, emulated on the CPU, against the twins: work lists, indices, masks and barriers.

The plans are made where the other kernel tests run.
"""

from __future__ import annotations

import pytest
import torch

from blendserve_kernels import reference
from blendserve_kernels.linear_silu_and_multiply import interleave_gate_up
from blendserve_kernels.triton_kernels.decode_attention import (
    PLAIN_PART,
    SUFFIX_PART,
    DecodePlan,
    LaunchShape,
    make_plan,
    rows_of_group,
)
from blendserve_kernels.triton_kernels.prefill_attention import plan_prefill_triton
from blendserve_kernels.triton_kernels.shared_prefix_attention import plan_splits
from tests.kernels.gluon_emulation import emulated
from tests.kernels.paged_requests import make_paged_requests

CPU = torch.device("cpu")
HALF = torch.float16


def _decode_work(plan: DecodePlan) -> list[torch.Tensor]:
    return [x.cpu() for x in (plan.list_length, plan.tile_list, plan.parts, plan.counters)]


@pytest.mark.parametrize(
    ("context_lens", "group_size", "head_dim", "num_programs", "box"),
    [
        ([1, 63, 0, 130, 16], 4, 64, 2, 16),
        ([1, 63, 0, 130, 16], 4, 64, 2, 8),
        ([64, 17, 65], 7, 128, 1, 32),
        ([700], 1, 64, 3, 64),
        ([300, 5, 128], 8, 64, 66, 16),
        ([0, 0], 4, 64, 5, 16),
        ([128] * 16, 1, 64, 17, 16),
    ],
)
def test_decode_attention(
    context_lens: list[int],
    group_size: int,
    head_dim: int,
    num_programs: int,
    box: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requests = make_paged_requests(
        context_lens, num_kv_heads=2, head_dim=head_dim, block_size=64, dtype=HALF, device=CPU
    )
    q = torch.randn(len(context_lens), 2 * group_size, head_dim).to(HALF)
    table, lens, cache = requests.block_table, requests.context_lens, (requests.k_cache, requests.v_cache)
    shape = LaunchShape(True, 64, 0, 4, num_programs, is_for_hopper=True)
    given = (cache[0].to(device), table.to(device), lens.to(device), group_size)
    work = _decode_work(make_plan(*given, part=PLAIN_PART, rows=rows_of_group(group_size), shape=shape))
    expected = reference.decode_attention(q.float(), *(x.float() for x in cache), table, lens, 0.125)
    kernel = emulated("decode_attention", monkeypatch)
    kernel.BOX = box
    for _ in range(2):  # the second launch finds the counters as the first one left them
        out = torch.full_like(q, torch.nan)
        kernel.launch(q, *cache, 0.125, *work, out, num_programs)
        torch.testing.assert_close(out.float(), expected, atol=4e-3, rtol=1e-2)


@pytest.mark.parametrize(
    ("context_lens", "chunk_lens", "group_size", "head_dim", "num_programs"),
    [
        ([130, 5, 400, 0], [130, 5, 33, 0], 4, 64, 3),
        ([300], [172], 3, 128, 2),
        ([129, 257], [129, 1], 8, 64, 40),
    ],
)
def test_prefill_attention(
    context_lens: list[int],
    chunk_lens: list[int],
    group_size: int,
    head_dim: int,
    num_programs: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requests = make_paged_requests(
        context_lens, num_kv_heads=2, head_dim=head_dim, block_size=128, dtype=HALF, device=CPU
    )
    bounds = torch.tensor([3, *chunk_lens]).cumsum(0).to(torch.int32)
    begin, end = int(bounds[0]), int(bounds[-1])
    num_columns = 2 * group_size * head_dim
    q = torch.full((end + 4, num_columns + 3), torch.nan, dtype=HALF)[:, 3:].view(end + 4, -1, head_dim)  # rows apart
    q[begin:end] = torch.randn(end - begin, 2 * group_size, head_dim).to(HALF)
    table, lens, cache = requests.block_table, requests.context_lens, (requests.k_cache, requests.v_cache)
    plan = plan_prefill_triton(cache[0], bounds.to(device), lens.to(device), len(q), 2 * group_size)
    out = torch.full_like(q, 8.0)
    kernel = emulated("prefill_attention", monkeypatch)
    work = (plan.pack, plan.list_length.cpu(), plan.block_list.cpu())
    kernel.launch(q, *cache, table, 0.125, *work, out, num_programs)
    expected = reference.prefill_attention(q.float(), *(x.float() for x in cache), table, bounds, lens, 0.125)
    torch.testing.assert_close(out[begin:end].float(), expected[begin:end], atol=4e-3, rtol=1e-2)
    assert torch.all(out[:begin] == 8.0)
    assert torch.all(out[end:] == 8.0)


def test_prefill_attention_of_no_chunks(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = torch.zeros(3, dtype=torch.int32, device=device)
    cache = torch.full((1, 1, 128, 64), torch.nan, dtype=HALF)
    plan = plan_prefill_triton(cache, zeros, zeros[:2], 4, 2)
    out = torch.full((4, 2, 64), 8.0, dtype=HALF)
    table = torch.full((2, 1), 2**30, dtype=torch.int32)
    kernel = emulated("prefill_attention", monkeypatch)
    work = (plan.pack, plan.list_length.cpu(), plan.block_list.cpu())
    kernel.launch(out, cache, cache, table, 0.1, *work, out.clone(), 2)
    assert torch.all(out == 8.0)


@pytest.mark.parametrize(("num_tokens", "num_in", "num_out"), [(1, 64, 256), (300, 320, 512), (129, 128, 768)])
def test_linear(num_tokens: int, num_in: int, num_out: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = emulated("linear", monkeypatch)
    x = torch.randn(num_tokens, num_in + 3).to(HALF)[:, 3:]  # rows apart
    gate, up = (torch.randn(num_out // 2, num_in).to(HALF) / 8 for _ in range(2))
    weight = interleave_gate_up(gate, up)
    for is_fused, width in ((False, num_out), (True, num_out // 2)):
        out = torch.full((num_tokens, width), torch.nan, dtype=HALF)
        kernel.launch(x, weight, out, is_fused, 2)
        expected = x.float() @ weight.float().t()
        if is_fused:
            expected = reference.linear_silu_and_multiply(x.float(), weight.float())
        torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("prefixes", "suffixes", "num_kv_heads", "group_size", "head_dim", "groups", "num_programs"),
    [
        # A group larger than a query block over 10 tiles, one of two requests over 3, an empty one, a request without.
        pytest.param(
            [1280] * 34 + [0] + [384] * 2,
            [1 + 9 * n % 130 for n in range(37)],
            *(1, 4, 64),
            ((0, 35, 0), (34, 2, 0)),
            3,
            id="ragged",
        ),
        pytest.param([512] * 8, [64] * 8, 2, 7, 128, ((0,), (8,)), 5, id="odd group of heads"),
        pytest.param([0] * 5, [70, 1, 300, 64, 0], 2, 4, 64, ((0,), (0,)), 4, id="empty group"),
    ],
)
def test_shared_prefix_attention(
    prefixes: list[int],
    suffixes: list[int],
    num_kv_heads: int,
    group_size: int,
    head_dim: int,
    groups: tuple[tuple[int, ...], tuple[int, ...]],
    num_programs: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context_lens = [prefix + suffix for prefix, suffix in zip(prefixes, suffixes, strict=True)]
    num_heads = group_size * num_kv_heads
    cache_of = {"head_dim": head_dim, "block_size": 128, "dtype": HALF, "device": CPU}
    requests = make_paged_requests(context_lens, num_shared_tokens=max(prefixes), num_kv_heads=num_kv_heads, **cache_of)
    table, lens, cache = requests.block_table, requests.context_lens, (requests.k_cache, requests.v_cache)
    for start, size in zip(*groups, strict=True):
        if size:
            table[start : start + size, : prefixes[start] // 128] = table[start, : prefixes[start] // 128].clone()
    prefix_lens = torch.tensor(prefixes, dtype=torch.int32, device=device)
    starts, sizes = torch.tensor(groups, dtype=torch.int32, device=device)
    q = torch.randn(len(prefixes), num_heads, head_dim).to(HALF)
    prefix = plan_splits(prefix_lens, starts, sizes, num_heads, num_kv_heads, num_programs=24)
    shape = LaunchShape(True, 64, 0, 4, num_programs, is_for_hopper=True)
    given = (cache[0].to(device), table.to(device), lens.to(device), group_size)
    suffix = make_plan(*given, part=SUFFIX_PART, rows=16, shape=shape, prefix_lens=prefix_lens)
    work = [prefix.pack, prefix.list_length.cpu(), prefix.block_list.cpu(), *_decode_work(suffix)]
    lse, sync = prefix.lse.cpu(), prefix.sync.cpu()
    expected = reference.decode_attention(q.float(), *(x.float() for x in cache), table, lens, 0.125)
    kernel = emulated("shared_prefix_attention", monkeypatch, uses=["decode_attention", "prefill_attention"])
    for _ in range(2):  # layers share the plan: the second one counts on
        out = torch.full_like(q, torch.nan)
        kernel.launch(q, *cache, table, 0.125, *work, sync, lse, out, num_programs)
        torch.testing.assert_close(out.float(), expected, atol=4e-3, rtol=1e-2)
    assert sync.tolist() == [2 * 2 * num_programs]
