"""Times the attention kernels on a GPU against the ceilings of the same run: copy bandwidth and cuBLAS.

    PYTHONPATH=kernels:. python benchmarks/kernels/attention.py --output benchmarks/results/kernels-h100.json

Every shape is first compared with its torch twin; a wrong result ends the run without a report.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING

import torch

from benchmarks.kernels.measuring import (
    BLOCK_SIZE,
    DTYPE,
    HEAD_DIM,
    HEADS,
    KV_BYTES_PER_TOKEN,
    KV_HEADS,
    check_close,
    copy_bytes_per_second,
    gemm_flops_per_second,
    median_seconds,
    random_block_table,
)
from benchmarks.kernels.reports import Row, run_and_report
from blendserve_kernels import reference
from blendserve_kernels.decode_attention import decode_attention, plan_decode
from blendserve_kernels.prefill_attention import plan_prefill, prefill_attention
from blendserve_kernels.shared_prefix_attention import plan_shared_prefix, shared_prefix_decode_attention

if TYPE_CHECKING:
    from blendserve_kernels.triton_kernels.decode_attention import DecodePlan
    from blendserve_kernels.triton_kernels.shared_prefix_attention import SharedPrefixPlan

SCALE = HEAD_DIM**-0.5
FEW_PROGRAMS = 48
MAX_TOKENS = 512 * 16384


class KVPool:
    """K and V for num_tokens tokens of one layer; smaller shapes take several disjoint parts of it in turn."""

    def __init__(self, num_tokens: int = MAX_TOKENS) -> None:
        shape = (num_tokens // BLOCK_SIZE, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        self.k_cache, self.v_cache = (torch.empty(shape, device="cuda", dtype=DTYPE) for _ in range(2))
        for cache in (self.k_cache, self.v_cache):
            for part in cache.split(4096):
                part.normal_()

    def parts(self, num_requests: int, context: int) -> list[torch.Tensor]:
        """Return block tables of disjoint parts that together hold 1 GiB or more where the pool allows it."""
        num_blocks = -(-context // BLOCK_SIZE)
        part_blocks = num_requests * num_blocks
        wanted = -(-(1 << 30) // (part_blocks * BLOCK_SIZE * KV_BYTES_PER_TOKEN))
        count = max(1, min(wanted, self.k_cache.shape[0] // part_blocks))
        return [random_block_table(num_requests, num_blocks, part * part_blocks) for part in range(count)]


def bench_decode(
    pool: KVPool,
    num_requests: int,
    context: int,
    copy_rate: float,
    num_programs: int | None,
    shortest: int | None = None,
) -> Row:
    """Time decode attention; bytes are those of the keys and values within the contexts, which may be ragged.

    The plan is timed apart: a step makes one for all its layers.
    """
    lens = torch.randint(shortest or context, context + 1, (num_requests,), device="cuda", dtype=torch.int32)
    q = torch.randn(num_requests, HEADS, HEAD_DIM, device="cuda", dtype=DTYPE)
    tables = pool.parts(num_requests, context)

    def plan(table: torch.Tensor) -> DecodePlan | None:
        return plan_decode(pool.k_cache, table, lens, HEADS, num_programs)

    def call(table: torch.Tensor, plan: DecodePlan | None) -> torch.Tensor:
        return decode_attention(q, pool.k_cache, pool.v_cache, table, lens, SCALE, plan=plan)

    plans = [plan(table) for table in tables]
    chosen = torch.randperm(num_requests, device="cuda")[:8]
    expected = decode_twin(pool, q[chosen], tables[-1][chosen], lens[chosen])
    check_close(f"decode {num_requests} x {context}", call(tables[-1], plans[-1])[chosen], expected)
    seconds = median_seconds([partial(call, *layer) for layer in zip(tables, plans, strict=True)])
    rate = int(lens.sum()) * KV_BYTES_PER_TOKEN / seconds
    return {
        "kernel": "decode",
        "batch": num_requests,
        "context": f"{shortest}-{context}" if shortest else context,
        "programs": num_programs or "all",
        "microseconds": seconds * 1e6,
        "plan_microseconds": median_seconds([partial(plan, table) for table in tables]) * 1e6,
        "tb_per_s": rate / 1e12,
        "share_of_copy": rate / copy_rate,
    }


def decode_twin(pool: KVPool, q: torch.Tensor, table: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
    """Return what the twin gives in float32 over a copy of the blocks that the table names."""
    blocks, positions = table.flatten().unique(return_inverse=True)
    k, v = (cache[blocks].float() for cache in (pool.k_cache, pool.v_cache))
    return reference.decode_attention(q.float(), k, v, positions.view(table.shape).to(torch.int32), lens, SCALE)


def bench_prefill(pool: KVPool, num_requests: int, num_tokens: int, gemm_rate: float) -> Row:
    """Time whole prompts; operations are those of the causal half, diagonal included."""
    lens = torch.full((num_requests,), num_tokens, device="cuda", dtype=torch.int32)
    bounds = torch.arange(num_requests + 1, device="cuda", dtype=torch.int32) * num_tokens
    q = torch.randn(num_requests * num_tokens, HEADS, HEAD_DIM, device="cuda", dtype=DTYPE)
    tables = pool.parts(num_requests, num_tokens)[:8]
    plan = plan_prefill(pool.k_cache, bounds, lens, len(q), HEADS)

    def call(table: torch.Tensor) -> torch.Tensor:
        return prefill_attention(q, pool.k_cache, pool.v_cache, table, bounds, lens, SCALE, num_tokens, plan)

    blocks = tables[-1].to(torch.int64).flatten()
    k, v = (cache[blocks].float() for cache in (pool.k_cache, pool.v_cache))
    table = torch.arange(len(blocks), device="cuda", dtype=torch.int32).view(num_requests, -1)
    expected = reference.prefill_attention(q.float(), k, v, table, bounds, lens, SCALE)
    check_close(f"prefill {num_requests} x {num_tokens}", call(tables[-1]), expected)
    seconds = median_seconds([partial(call, table) for table in tables])
    rate = 4 * HEADS * HEAD_DIM * num_requests * num_tokens * (num_tokens + 1) / 2 / seconds
    return {
        "kernel": "prefill",
        "batch": num_requests,
        "context": num_tokens,
        "microseconds": seconds * 1e6,
        "tflop_per_s": rate / 1e12,
        "share_of_gemm": rate / gemm_rate,
    }


def bench_invariant_decode(pool: KVPool, num_requests: int, context: int, copy_rate: float) -> Row:
    """Time decode as chunks of one token through prefill attention, whose rows don't depend on the batch."""
    lens = torch.full((num_requests,), context, device="cuda", dtype=torch.int32)
    bounds = torch.arange(num_requests + 1, device="cuda", dtype=torch.int32)
    q = torch.randn(num_requests, HEADS, HEAD_DIM, device="cuda", dtype=DTYPE)
    tables = pool.parts(num_requests, context)
    plan = plan_prefill(pool.k_cache, bounds, lens, num_requests, HEADS)

    def call(table: torch.Tensor) -> torch.Tensor:
        return prefill_attention(q, pool.k_cache, pool.v_cache, table, bounds, lens, SCALE, 1, plan)

    chosen = torch.randperm(num_requests, device="cuda")[:8]
    expected = decode_twin(pool, q[chosen], tables[-1][chosen], lens[chosen])
    check_close(f"invariant decode {num_requests} x {context}", call(tables[-1])[chosen], expected)
    seconds = median_seconds([partial(call, table) for table in tables])
    rate = num_requests * context * KV_BYTES_PER_TOKEN / seconds
    return {
        "kernel": "batch-invariant decode",
        "batch": num_requests,
        "context": context,
        "microseconds": seconds * 1e6,
        "share_of_copy": rate / copy_rate,
    }


def bench_shared_prefix(pool: KVPool, num_requests: int, prefix: int, suffix: int) -> Row:
    """Time one group's decode with its prefix read once, against plain decode of the same requests."""
    lens = torch.full((num_requests,), prefix + suffix, device="cuda", dtype=torch.int32)
    prefix_lens = torch.full_like(lens, prefix)
    starts, sizes = (torch.tensor([n], device="cuda", dtype=torch.int32) for n in (0, num_requests))
    q = torch.randn(num_requests, HEADS, HEAD_DIM, device="cuda", dtype=DTYPE)
    tables = [*pool.parts(num_requests, prefix + suffix), *pool.parts(num_requests, prefix + suffix)][:4]
    for table in tables:
        table[:, : prefix // BLOCK_SIZE] = table[0, : prefix // BLOCK_SIZE].clone()

    def shared(table: torch.Tensor, plan: SharedPrefixPlan | None) -> torch.Tensor:
        return shared_prefix_decode_attention(
            q, pool.k_cache, pool.v_cache, table, lens, prefix_lens, starts, sizes, SCALE, plan=plan
        )

    def plain(table: torch.Tensor, plan: DecodePlan | None) -> torch.Tensor:
        return decode_attention(q, pool.k_cache, pool.v_cache, table, lens, SCALE, plan=plan)

    plans = [plan_shared_prefix(pool.k_cache, table, lens, prefix_lens, starts, sizes, HEADS) for table in tables]
    plain_plans = [plan_decode(pool.k_cache, table, lens, HEADS) for table in tables]

    check_close(
        f"shared prefix {prefix} + {suffix}", shared(tables[-1], plans[-1]), decode_twin(pool, q, tables[-1], lens)
    )
    shared_seconds = median_seconds([partial(shared, *layer) for layer in zip(tables, plans, strict=True)])
    plain_seconds = median_seconds([partial(plain, *layer) for layer in zip(tables, plain_plans, strict=True)])
    return {
        "kernel": "shared prefix",
        "batch": num_requests,
        "context": f"{prefix}+{suffix}",
        "microseconds": shared_seconds * 1e6,
        "plain_microseconds": plain_seconds * 1e6,
        "times_plain": plain_seconds / shared_seconds,
    }


def run_all() -> Row:
    """Measure the ceilings and every shape of the report."""
    copy_rate = copy_bytes_per_second()
    gemm_rates = {num_tokens: gemm_flops_per_second(num_tokens) for num_tokens in (2048, 4096, 8192)}
    pool = KVPool()
    rows = []
    for num_programs in (None, FEW_PROGRAMS):
        for batch, context in itertools.product((64, 256, 512), (512, 2048, 8192, 16384)):
            rows.append(bench_decode(pool, batch, context, copy_rate, num_programs))
        for batch, shortest, context in ((400, 700, 700), (1000, 100, 300), (1000, 1, 1000), (256, 1, 4096)):
            rows.append(bench_decode(pool, batch, context, copy_rate, num_programs, shortest))
    rows += [bench_decode(pool, *shape, copy_rate, None) for shape in ((1, 131072), (16, 65536))]
    rows += [bench_invariant_decode(pool, *shape, copy_rate) for shape in ((64, 512), (256, 2048), (1000, 200))]
    for shape in ((1, 2048), (4, 2048), (1, 4096), (1, 8192), (16, 512)):
        rows.append(bench_prefill(pool, *shape, gemm_rates[shape[0] * shape[1]]))
    rows += [bench_shared_prefix(pool, 64, 4096, suffix) for suffix in (64, 128, 512)]
    return {
        "copy_tb_per_s": copy_rate / 1e12,
        "gemm_tflop_per_s": {str(tokens): rate / 1e12 for tokens, rate in gemm_rates.items()},
        "rows": rows,
    }


if __name__ == "__main__":
    run_and_report(__doc__, run_all)
