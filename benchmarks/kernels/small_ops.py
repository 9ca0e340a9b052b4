"""Times the ops between the products on a GPU, as shares of the copy bandwidth of the same run.

    PYTHONPATH=kernels:. python benchmarks/kernels/small_ops.py --output benchmarks/results/kernels-h100-small-ops.json

The bytes are each input read once and each output written once, so 1.0 is the floor of an op that runs by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.kernels.measuring import BLOCK_SIZE, DTYPE, HEAD_DIM, HEADS, KV_HEADS, copy_bytes_per_second
from benchmarks.kernels.measuring import median_seconds as time_calls
from benchmarks.kernels.reports import Row, run_and_report
from blendserve_kernels.logprobs import logprobs
from blendserve_kernels.rms_norm import add_rms_norm, rms_norm
from blendserve_kernels.rotary import rotary_and_store_kv
from blendserve_kernels.sampling import greedy, sample
from blendserve_kernels.silu_and_multiply import silu_and_multiply

HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 14336, 128256
NUM_TOKENS = (128, 512, 2048, 8192)
NUM_ROWS = (16, 128, 512)
SETTINGS = {"temperature": (0, 1.0), "top_k 50": (50, 1.0), "top_p 0.9": (0, 0.9), "top_k 50, top_p 0.9": (50, 0.9)}


def _time(name: str, size: int, calls: list[Callable[[], object]], num_bytes: int, copy_rate: float) -> Row:
    seconds = time_calls(calls, 9)
    share = num_bytes / seconds / copy_rate
    return {"kernel": name, "size": size, "microseconds": seconds * 1e6, "share_of_copy": share}


def _copies(size: tuple[int, ...], num_bytes: int) -> list[torch.Tensor]:
    """Return so many random tensors that together they exceed the L2 cache."""
    count = min(64, max(2, -(-(1 << 28) // num_bytes)))
    return [torch.randn(size, device="cuda", dtype=DTYPE) for _ in range(count)]


def bench_norms(num_tokens: int, copy_rate: float) -> list[Row]:
    """Time RMSNorm, with and without the residual."""
    row_bytes = num_tokens * HIDDEN * 2
    weight = torch.randn(HIDDEN, device="cuda", dtype=DTYPE)
    inputs = _copies((num_tokens, HIDDEN), row_bytes)
    pairs = zip(inputs, reversed(inputs), strict=True)
    alone = [partial(rms_norm, x, weight, 1e-5) for x in inputs]
    with_residual = [partial(add_rms_norm, x, residual, weight, 1e-5) for x, residual in pairs]
    return [
        _time("rms_norm", num_tokens, alone, 2 * row_bytes, copy_rate),
        _time("add_rms_norm", num_tokens, with_residual, 4 * row_bytes, copy_rate),
    ]


def bench_silu(num_tokens: int, copy_rate: float) -> Row:
    """Time SiLU-and-multiply."""
    num_bytes = num_tokens * INTERMEDIATE * 2 * 3
    calls = [partial(silu_and_multiply, x) for x in _copies((num_tokens, 2 * INTERMEDIATE), num_bytes)]
    return _time("silu_and_multiply", num_tokens, calls, num_bytes, copy_rate)


def bench_rotary(num_tokens: int, copy_rate: float) -> Row:
    """Time the rotary embedding with the store of keys and values."""
    num_heads = HEADS + 2 * KV_HEADS
    num_bytes = 2 * num_tokens * num_heads * HEAD_DIM * 2
    cache_shape = (-(-num_tokens // BLOCK_SIZE), KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    positions = torch.arange(num_tokens, device="cuda")
    cos_sin = torch.randn(num_tokens, HEAD_DIM, device="cuda")
    calls = []
    for qkv in _copies((num_tokens, num_heads, HEAD_DIM), num_bytes):
        q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        caches = [torch.empty(cache_shape, device="cuda", dtype=DTYPE) for _ in range(2)]
        calls.append(partial(rotary_and_store_kv, q, k, v, positions, cos_sin, *caches, positions))
    return _time("rotary_and_store_kv", num_tokens, calls, num_bytes, copy_rate)


def bench_sampling(num_rows: int, copy_rate: float) -> list[Row]:
    """Time greedy and drawn tokens, and log-probabilities; the bytes are the logits read once."""
    num_bytes = num_rows * VOCABULARY * 2
    logits = [x.mul_(3) for x in _copies((num_rows, VOCABULARY), num_bytes)]
    seeds = torch.arange(num_rows, device="cuda")

    def full(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full((num_rows,), value, device="cuda", dtype=dtype)

    rows = [_time("greedy", num_rows, [partial(greedy, x) for x in logits], num_bytes, copy_rate)]
    for name, (top_k, top_p) in SETTINGS.items():
        settings = (full(0.8), full(top_k, torch.int32), full(top_p), full(0.0), seeds, seeds)
        calls = [partial(sample, x, *settings) for x in logits[:4]]
        rows.append(_time(f"sample {name}", num_rows, calls, num_bytes, copy_rate))
    calls = [partial(logprobs, x, seeds, 20) for x in logits[:4]]
    return [*rows, _time("logprobs top 20", num_rows, calls, num_bytes, copy_rate)]


def run_all() -> Row:
    """Measure the copy bandwidth and every op."""
    copy_rate = copy_bytes_per_second()
    rows: list[Row] = []
    for num_tokens in NUM_TOKENS:
        rows += [*bench_norms(num_tokens, copy_rate), bench_silu(num_tokens, copy_rate)]
        rows.append(bench_rotary(num_tokens, copy_rate))
    for num_rows in NUM_ROWS:
        rows += bench_sampling(num_rows, copy_rate)
    return {"copy_tb_per_s": copy_rate / 1e12, "rows": rows}


if __name__ == "__main__":
    run_and_report(__doc__, run_all)
