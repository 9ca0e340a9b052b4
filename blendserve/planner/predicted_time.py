"""How long a shard will take: its work, and what its steps cost beside it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from blendserve.models.config import ModelShape
from blendserve.planner.performance_model import Hardware, step_floor_seconds, step_overhead_seconds


def predict_seconds(
    hardware: Hardware,
    shape: ModelShape,
    *,
    compute_seconds: float,
    memory_seconds: float,
    num_prompt_tokens: NDArray[np.int32],
    output_tokens: NDArray[np.int64],
    cache_tokens: int,
    max_num_seqs: int,
) -> float:
    """Seconds that requests with so much work take together on `hardware`.

    num_prompt_tokens, output_tokens: [num_requests]. cache_tokens: of the KV cache. max_num_seqs: that run at one time.
    A run has as many steps as its longest output, or more where the cache holds too few requests to be done by then;
    their products take at least as long as reading the weights so many times.
    """
    decodes = output_tokens.astype(np.float64)
    if decodes.sum() == 0:
        return hardware.seconds(compute_seconds, memory_seconds)
    kv_reads = float((num_prompt_tokens * decodes + decodes**2 / 2).sum())
    num_together = min(float(max_num_seqs), max(cache_tokens * float(decodes.sum()) / max(kv_reads, 1.0), 1.0))
    num_steps = max(float(decodes.max()), float(decodes.sum()) / num_together)
    products = max(compute_seconds, step_floor_seconds(shape, hardware) * num_steps)
    return step_overhead_seconds(hardware) * num_steps + hardware.seconds(products, memory_seconds)
