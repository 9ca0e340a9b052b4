"""Times the products of a layer on a GPU: cuBLAS, the batch-invariant kernel, and the fused half of the MLP.

    PYTHONPATH=kernels:. python benchmarks/kernels/linear.py --output benchmarks/results/kernels-h100-linear.json

The candidates run in turn, several rounds of them, so that the chip's temperature and power are the same for all.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own custom)

from benchmarks.kernels.measuring import DTYPE, PROJECTIONS, check_close, median_seconds
from benchmarks.kernels.reports import Row, run_and_report
from blendserve_kernels.gluon_kernels import linear as fused_kernel
from blendserve_kernels.linear import linear
from blendserve_kernels.silu_and_multiply import silu_and_multiply

NUM_TOKENS = (128, 256, 384, 512, 640, 768, 1024, 1536, 2048, 3072, 4096, 8192)
ROUNDS = 3
NUM_SMS = 132


def seconds_in_turn(candidates: dict[str, list[Callable[[], object]]]) -> dict[str, float]:
    """Return each candidate's median of its rounds, in seconds per call."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(ROUNDS):
        for name, calls in candidates.items():
            seconds[name].append(median_seconds(calls, 7))
    return {name: statistics.median(rounds) for name, rounds in seconds.items()}


def bench_projection(num_tokens: int, num_in: int, num_out: int) -> Row:
    """Time cuBLAS and the batch-invariant kernel on one projection."""
    operands = [
        (
            torch.randn(num_tokens, num_in, device="cuda", dtype=DTYPE),
            torch.randn(num_out, num_in, device="cuda", dtype=DTYPE) / num_in**0.5,
        )
        for _ in range(2)
    ]
    x, weight = operands[0]
    check_close(f"linear {num_tokens} x {num_in} x {num_out}", linear(x, weight), x.float() @ weight.float().t())
    seconds = seconds_in_turn(
        {name: [partial(run, *o) for o in operands] for name, run in (("c", F.linear), ("k", linear))}
    )
    flops = 2 * num_tokens * num_in * num_out
    return {
        "kernel": "linear",
        "tokens": num_tokens,
        "shape": f"{num_in}x{num_out}",
        "cublas_tflop_per_s": flops / seconds["c"] / 1e12,
        "kernel_tflop_per_s": flops / seconds["k"] / 1e12,
        "times_cublas": seconds["c"] / seconds["k"],
    }


def bench_fused(num_tokens: int, num_in: int, num_out: int) -> Row:
    """Time the gated half of the MLP: cuBLAS and the activation, and the fused kernel."""
    operands = [
        (
            torch.randn(num_tokens, num_in, device="cuda", dtype=DTYPE),
            torch.randn(num_out, num_in, device="cuda", dtype=DTYPE) / num_in**0.5,
        )
        for _ in range(2)
    ]
    out = torch.empty(num_tokens, num_out // 2, device="cuda", dtype=DTYPE)

    def fused(x: torch.Tensor, weight: torch.Tensor) -> None:
        fused_kernel.launch(x, weight, out, True, NUM_SMS)

    def apart(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return silu_and_multiply(F.linear(x, weight))

    seconds = seconds_in_turn(
        {name: [partial(run, *o) for o in operands] for name, run in (("a", apart), ("f", fused))}
    )
    return {
        "kernel": "linear + silu",
        "tokens": num_tokens,
        "shape": f"{num_in}x{num_out}",
        "apart_microseconds": seconds["a"] * 1e6,
        "fused_microseconds": seconds["f"] * 1e6,
        "times_apart": seconds["a"] / seconds["f"],
    }


def run_all() -> Row:
    """Measure every projection and the fused one at all token counts."""
    rows = []
    for num_tokens in NUM_TOKENS:
        rows.append(bench_fused(num_tokens, *PROJECTIONS[2]))
        rows += [bench_projection(num_tokens, *shape) for shape in PROJECTIONS]
    return {"rows": rows}


if __name__ == "__main__":
    run_and_report(__doc__, run_all)
