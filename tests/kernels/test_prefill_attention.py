"""The Triton prefill attention against its twin in float32."""

from __future__ import annotations

import pytest
import torch

from blendserve_kernels import reference
from blendserve_kernels.prefill_attention import prefill_attention
from blendserve_kernels.triton_kernels.prefill_attention import (
    PrefillShape,
    choose_prefill_shape,
    plan_prefill_triton,
    prefill_attention_triton,
)
from tests.kernels.paged_requests import ATTENTION_TOLERANCE, HALF_DTYPES, make_paged_requests

HEADS_FOR_HOPPER = [(4, 128), (7, 64)]
if torch.cuda.is_available():
    HEADS_FOR_HOPPER += [(1, 64), (8, 128), (6, 128)]


def check_prefill_attention(
    context_lens: list[int],
    chunk_lens: list[int],
    *,
    group_size: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    shape: PrefillShape | None = None,
    device: torch.device,
) -> None:
    requests = make_paged_requests(
        context_lens, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size, dtype=dtype, device=device
    )
    q = torch.randn(sum(chunk_lens), num_kv_heads * group_size, head_dim, device=device).to(dtype)
    cu_seqlens_q = torch.tensor([0, *chunk_lens]).cumsum(0).to(torch.int32).to(device)
    arguments = (requests.block_table, cu_seqlens_q, requests.context_lens, head_dim**-0.5)
    out = prefill_attention_triton(q, requests.k_cache, requests.v_cache, *arguments, max(chunk_lens), shape=shape)
    expected = reference.prefill_attention(q.float(), requests.k_cache.float(), requests.v_cache.float(), *arguments)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, atol=ATTENTION_TOLERANCE[dtype], rtol=1e-2)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group_size", [1, 3, 4, 7, 8])
def test_prefill_attention_of_group_and_head_sizes(group_size: int, head_dim: int, device: torch.device) -> None:
    check_prefill_attention([1, 63, 100, 40], [1, 63, 30, 0], group_size=group_size, head_dim=head_dim, device=device)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("block_size", [16, 64, 128])
def test_prefill_attention_of_dtypes_and_block_sizes(dtype: torch.dtype, block_size: int, device: torch.device) -> None:
    check_prefill_attention(
        [33, 200, 150], [33, 80, 1], head_dim=128, block_size=block_size, dtype=dtype, device=device
    )


@pytest.mark.parametrize("use_tma", [False, True])
def test_prefill_attention_of_one_long_prompt(use_tma: bool, device: torch.device) -> None:
    shape = PrefillShape(use_tma=use_tma, rows=128, tile=32, num_stages=2, num_warps=4)
    check_prefill_attention([1000], [1000], group_size=2, num_kv_heads=1, block_size=32, shape=shape, device=device)


@pytest.mark.parametrize("use_tma", [False, True])
def test_prefill_attention_of_chunks_over_cached_prefixes(use_tma: bool, device: torch.device) -> None:
    shape = PrefillShape(use_tma=use_tma, rows=64, tile=32, num_stages=2, num_warps=4)
    check_prefill_attention(
        [511, 97, 200, 5], [63, 33, 1, 5], num_kv_heads=1, block_size=32, shape=shape, device=device
    )


def test_prefill_attention_takes_larger_tiles_for_longer_chunks() -> None:
    k_cache = torch.zeros(2, 2, 128, 64, dtype=torch.bfloat16)
    short, long = (choose_prefill_shape(k_cache, 8, max_seqlen_q) for max_seqlen_q in (2048, 2049))
    assert (short.rows, short.tile) < (long.rows, long.tile)


def test_prefill_attention_of_chunks_in_pieces_equals_the_whole(device: torch.device) -> None:
    requests = make_paged_requests([90], num_kv_heads=1, head_dim=64, block_size=16, dtype=torch.float32, device=device)
    q = torch.randn(90, 2, 64, device=device)

    def run(begin: int, end: int) -> torch.Tensor:
        bounds = torch.tensor([0, end - begin], dtype=torch.int32, device=device)
        context_lens = torch.tensor([end], dtype=torch.int32, device=device)
        return prefill_attention_triton(
            q[begin:end],
            requests.k_cache,
            requests.v_cache,
            requests.block_table,
            bounds,
            context_lens,
            0.125,
            end - begin,
        )

    pieces = torch.cat([run(0, 33), run(33, 34), run(34, 90)])
    torch.testing.assert_close(pieces, run(0, 90), atol=2e-5, rtol=0)


def test_prefill_attention_writes_the_rows_of_its_chunks_only(device: torch.device) -> None:
    # Decodes before the chunks, padding behind them: rows and requests of a captured batch.
    requests = make_paged_requests(
        [33, 1, 70, 0, 0], num_kv_heads=2, head_dim=64, block_size=16, dtype=torch.float32, device=device
    )
    bounds = torch.tensor([7, 40, 40, 45, 45, 45], dtype=torch.int32, device=device)
    q = torch.full((61, 6, 64), torch.nan, device=device)
    q[7:45] = torch.randn(38, 6, 64, device=device)
    arguments = (q, requests.k_cache, requests.v_cache, requests.block_table, bounds, requests.context_lens, 0.125)
    expected = reference.prefill_attention(
        q[7:45], requests.k_cache, requests.v_cache, requests.block_table, bounds - 7, requests.context_lens, 0.125
    )
    for run in (prefill_attention_triton, prefill_attention):
        buffer = torch.full((64, 6, 64), 8.0, device=device)
        assert run(*arguments, 38, out=buffer[:61]).data_ptr() == buffer.data_ptr()
        torch.testing.assert_close(buffer[7:45], expected, atol=2e-5, rtol=0)
        assert torch.all(buffer[:7] == 8.0)
        assert torch.all(buffer[45:] == 8.0)


def _expected_blocks(bounds: list[int], context_lens: list[int], tokens: int) -> list[list[int]]:
    blocks = []
    for request, context_len in enumerate(context_lens):
        begin, end = bounds[request], bounds[request + 1]
        for first in range(begin, end, tokens):
            num_tokens = min(tokens, end - first)
            position = context_len - (end - first)
            blocks.append([first, num_tokens, position, (position + num_tokens - 1) // 128 + 1, request, context_len])
    return sorted(blocks, key=lambda block: -block[3])  # stable: requests and their blocks stay in order


@pytest.mark.parametrize(
    ("chunk_lens", "context_lens"),
    [
        ([1], [1]),
        ([0, 300, 33, 0, 128, 1, 0], [0, 300, 500, 7, 128, 1000, 0]),
        ([257, 31, 400], [2000, 31, 400]),
    ],
)
def test_prefill_plan_lists_every_query_block_once_longest_first(
    chunk_lens: list[int], context_lens: list[int], device: torch.device
) -> None:
    bounds = torch.tensor([5, *chunk_lens]).cumsum(0)
    k_cache = torch.zeros(1, 2, 128, 64, device=device)
    lens = torch.tensor(context_lens, dtype=torch.int32, device=device)
    plan = plan_prefill_triton(k_cache, bounds.to(torch.int32).to(device), lens, int(bounds[-1]) + 3, 8)
    length = int(plan.list_length)
    assert plan.pack == 4
    assert plan.block_list[:length, :6].tolist() == _expected_blocks(bounds.tolist(), context_lens, 32)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize(("group_size", "head_dim"), HEADS_FOR_HOPPER)
def test_prefill_attention_of_blocks_of_128(
    group_size: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    # The blocks that the kernel for Hopper wants: full, partial and unaligned tiles, chunks behind cached tokens.
    check_prefill_attention(
        [130, 5, 700, 256, 0, 300],
        [130, 5, 33, 256, 0, 172],
        group_size=group_size,
        num_kv_heads=1,
        head_dim=head_dim,
        block_size=128,
        dtype=dtype,
        device=device,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_of_prefill_attention_depend_on_neither_batch_nor_chunk(dtype: torch.dtype, device: torch.device) -> None:
    # Decodes too, as chunks of one token: bitwise the rows of the whole prompt.
    requests = make_paged_requests(
        [300, 140, 129], num_kv_heads=1, head_dim=64, block_size=128, dtype=dtype, device=device
    )
    bounds = [0, 300, 440, 569]
    q = torch.randn(569, 4, 64, device=device).to(dtype)
    cache = (requests.k_cache, requests.v_cache)
    on_device = torch.tensor(bounds, dtype=torch.int32, device=device)
    longest = 4096  # an upper bound that is the same for all: it chooses the tiles
    whole = prefill_attention_triton(q, *cache, requests.block_table, on_device, requests.context_lens, 0.125, longest)
    for request, begin, end in [(0, 0, 45), (0, 45, 300), (0, 299, 300), (1, 139, 140), (2, 1, 129)]:
        rows = slice(bounds[request] + begin, bounds[request] + end)
        chunk = torch.tensor([0, end - begin], dtype=torch.int32, device=device)
        lens = torch.tensor([end], dtype=torch.int32, device=device)
        table = requests.block_table[request : request + 1]
        alone = prefill_attention_triton(q[rows], *cache, table, chunk, lens, 0.125, longest)
        assert torch.equal(alone, whole[rows])


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_prefill_attention_of_nothing_but_padding(dtype: torch.dtype, device: torch.device) -> None:
    k_cache = torch.full((2, 2, 128, 64), torch.nan, device=device, dtype=dtype)
    zeros = torch.zeros(4, dtype=torch.int32, device=device)
    out = torch.full((5, 4, 64), 8.0, device=device, dtype=dtype)
    table = torch.full((3, 2), 2**30, dtype=torch.int32, device=device)
    prefill_attention_triton(torch.zeros_like(out), k_cache, k_cache, table, zeros, zeros[:3], 0.1, 5, out=out)
    assert torch.all(out == 8.0)
