"""Times launch shapes that the attention kernels don't choose by themselves, to see whether they should.

PYTHONPATH=kernels:. python benchmarks/kernels/tuning.py
"""

# Every closure is called before its loop goes on.
# ruff: noqa: B023

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.kernels.attention import FEW_PROGRAMS, SCALE, KVPool
from benchmarks.kernels.linear import seconds_in_turn
from benchmarks.kernels.measuring import (
    DTYPE,
    HEAD_DIM,
    HEADS,
    KV_BYTES_PER_TOKEN,
    PROJECTIONS,
    median_seconds,
)
from blendserve_kernels.gluon_kernels import linear as hopper_linear
from blendserve_kernels.silu_and_multiply import silu_and_multiply
from blendserve_kernels.triton_kernels.decode_attention import (
    LaunchShape,
    decode_attention_triton,
    plan_decode_triton,
)
from blendserve_kernels.triton_kernels.prefill_attention import PrefillShape, prefill_attention_triton


def _attempt(name: str, figure: Callable[[], str]) -> None:
    try:
        print(f"{name:60}", figure(), flush=True)
    except Exception as error:  # noqa: BLE001 - a shape may exceed the GPU's resources in many ways; the others go on
        print(f"{name:60}", "fails:", str(error).splitlines()[0][:80], flush=True)


def tune_decode(pool: KVPool) -> None:
    """Print TB/s of decode attention for tiles, stages and warps."""
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    for batch, context in ((64, 512), (256, 2048)):
        lens = torch.full((batch,), context, device="cuda", dtype=torch.int32)
        q = torch.randn(batch, HEADS, HEAD_DIM, device="cuda", dtype=DTYPE)
        tables = pool.parts(batch, context)
        for use_tma, tile, stages, warps in (
            (True, 128, 7, 4),
            (True, 128, 5, 8),
            (True, 128, 7, 8),
            (True, 128, 7, 16),
        ):
            for programs in (num_sms, FEW_PROGRAMS):
                shape = LaunchShape(use_tma, tile, stages, warps, programs)

                def figure(shape: LaunchShape = shape) -> str:
                    calls = [
                        partial(
                            decode_attention_triton,
                            *(q, pool.k_cache, pool.v_cache, table, lens, SCALE),
                            plan=plan_decode_triton(pool.k_cache, table, lens, HEADS, shape=shape),
                        )
                        for table in tables
                    ]
                    seconds = median_seconds(calls, 9)
                    return f"{batch * context * KV_BYTES_PER_TOKEN / seconds / 1e12:.3f} TB/s {seconds * 1e6:.1f} us"

                _attempt(f"decode {batch} x {context} {shape}"[:110].replace("LaunchShape", ""), figure)


def tune_prefill(pool: KVPool) -> None:
    """Print TFLOP/s of prefill attention for tiles, stages and warps."""
    for num_tokens in (2048, 4096):
        lens = torch.tensor([num_tokens], device="cuda", dtype=torch.int32)
        bounds = torch.tensor([0, num_tokens], device="cuda", dtype=torch.int32)
        q = torch.randn(num_tokens, HEADS, HEAD_DIM, device="cuda", dtype=DTYPE)
        tables = pool.parts(1, num_tokens)[:8]
        for rows, tile, stages, warps in (
            (128, 128, 5, 8),
            (64, 64, 5, 4),
            (64, 64, 5, 8),
            (128, 64, 5, 8),
        ):
            shape = PrefillShape(True, rows, tile, stages, warps)

            def figure(shape: PrefillShape = shape) -> str:
                calls = [
                    partial(
                        prefill_attention_triton,
                        *(q, pool.k_cache, pool.v_cache, table, bounds, lens, SCALE, num_tokens),
                        shape=shape,
                    )
                    for table in tables
                ]
                seconds = median_seconds(calls, 7)
                return f"{2 * HEADS * HEAD_DIM * num_tokens**2 / seconds / 1e12:.0f} TFLOP/s {seconds * 1e6:.0f} us"

            _attempt(f"prefill {num_tokens} {shape}".replace("PrefillShape", ""), figure)


def tune_linear(pool: KVPool) -> None:
    """Print the time of the fused half of the MLP for groups of row tiles, and of cuBLAS with the activation."""
    num_in, num_out = PROJECTIONS[2]
    for num_tokens in (128, 256, 384, 512, 640, 768, 1024, 1536, 2048, 4096, 8192):
        operands = [
            (
                torch.randn(num_tokens, num_in, device="cuda", dtype=DTYPE),
                torch.randn(num_out, num_in, device="cuda", dtype=DTYPE) / num_in**0.5,
            )
            for _ in range(2)
        ]
        out = torch.empty(num_tokens, num_out // 2, device="cuda", dtype=DTYPE)

        def fused(x: torch.Tensor, weight: torch.Tensor, group_m: int) -> None:
            hopper_linear._GROUP_M = group_m
            hopper_linear.launch(x, weight, out, True, torch.cuda.get_device_properties(0).multi_processor_count)

        def apart(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return silu_and_multiply(torch.nn.functional.linear(x, weight))

        candidates = {f"group {g}": [partial(fused, *o, g) for o in operands] for g in (4, 8, 16, 32)}
        candidates["apart"] = [partial(apart, *o) for o in operands]
        _attempt(
            f"linear + silu {num_tokens}",
            lambda: " ".join(f"{name} {seconds * 1e6:.0f}" for name, seconds in seconds_in_turn(candidates).items()),
        )


if __name__ == "__main__":
    torch.manual_seed(0)
    kv_pool = KVPool()
    wanted = sys.argv[1:] or ["decode", "prefill", "linear"]
    for tune in (tune_decode, tune_prefill, tune_linear):
        if tune.__name__.removeprefix("tune_") in wanted:
            tune(kv_pool)
