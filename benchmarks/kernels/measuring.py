"""How the kernel benchmarks time, check and describe what they run."""

from __future__ import annotations

import math
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from blendserve.nvidia_smi import query_gpus

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128  # Llama-3.1-8B
PROJECTIONS = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))  # its four GEMMs, [in, out]
BLOCK_SIZE = 128
KV_BYTES_PER_TOKEN = 2 * KV_HEADS * HEAD_DIM * 2
DTYPE = torch.bfloat16


class WrongResultError(Exception):
    """A benchmarked shape gives a wrong result, so its time means nothing."""


_MIN_GRAPH_SECONDS = 1e-3  # the launch of a graph takes some microseconds of its own


def _replay_seconds(calls: Sequence[Callable[[], object]], num_replays: int) -> list[float]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    seconds = []
    for _ in range(num_replays + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return seconds[2:]


def median_seconds(calls: Sequence[Callable[[], object]], num_replays: int = 15) -> float:
    """Return the median seconds per call, all calls captured in one CUDA graph and replayed.

    `calls` should together touch more memory than the L2 cache holds, each its own. Short ones are repeated.
    """
    for call in calls:  # compiles
        call()
    torch.cuda.synchronize()
    estimate = min(_replay_seconds(calls, 1)) * len(calls)
    repeats = max(1, math.ceil(_MIN_GRAPH_SECONDS / estimate))
    return statistics.median(_replay_seconds(list(calls) * repeats, num_replays))


def hot_seconds(work: Callable[[], object], lasting: float) -> tuple[float, str, str]:
    """Return the seconds that `work` takes when the GPU is as hot and as slow as it gets, its clock and its power.

    `work` is captured in a CUDA graph. lasting: seconds of replays that are measured; half as many go before.
    """
    work()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    seconds = 0.0
    for wanted in (0.0, lasting / 2, lasting):  # how long one takes; until the GPU is hot; measured
        count = max(int(wanted / seconds), 1) if seconds else 2
        torch.cuda.synchronize()
        began = time.perf_counter()
        first.record()
        for _ in range(count):
            graph.replay()
        last.record()
        if wanted == lasting:
            time.sleep(max(lasting / 2 - (time.perf_counter() - began), 0.0))
            clock, watts = query_gpus("clocks.sm,power.draw.instant")[0].split(", ")
        torch.cuda.synchronize()
        seconds = first.elapsed_time(last) / 1e3 / count
    return seconds, clock, watts


def copy_bytes_per_second() -> float:
    """Return the bandwidth of a 4 GiB copy on the device, bytes read and written: the best of memcpy and a kernel."""
    source = torch.randn(1 << 31, device="cuda", dtype=DTYPE)
    target = torch.empty_like(source)
    copies = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    return max(2 * source.nbytes / median_seconds([copy]) for copy in copies)


def gemm_flops_per_second(num_tokens: int) -> float:
    """Return the rate of the four projections of a layer through cuBLAS, two layers in turn."""
    calls: list[Callable[[], object]] = []
    num_flops = 0
    for _ in range(2):
        for num_in, num_out in PROJECTIONS:
            x = torch.randn(num_tokens, num_in, device="cuda", dtype=DTYPE)
            weight = torch.randn(num_out, num_in, device="cuda", dtype=DTYPE)
            calls.append(partial(torch.nn.functional.linear, x, weight))
            num_flops += 2 * num_tokens * num_in * num_out
    return num_flops / (median_seconds(calls) * len(calls))


def check_close(name: str, out: torch.Tensor, expected: torch.Tensor, max_relative_error: float = 8e-3) -> None:
    """Raise WrongResultError unless ||out - expected|| / ||expected|| is small; NaN never passes."""
    error = ((out.float() - expected.float()).norm() / expected.float().norm()).item()
    if not error < max_relative_error:
        raise WrongResultError(f"{name}: relative error {error:.2e}, expected under {max_relative_error:.0e}")


def random_block_table(num_requests: int, num_blocks: int, first_block: int) -> torch.Tensor:
    """Return int32 [num_requests, num_blocks] of distinct blocks from first_block on, shuffled."""
    blocks = torch.randperm(num_requests * num_blocks, device="cuda") + first_block
    return blocks.to(torch.int32).view(num_requests, num_blocks)


def current_commit() -> str:
    """Return the commit of the working tree, or "unknown" where there is no git."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
