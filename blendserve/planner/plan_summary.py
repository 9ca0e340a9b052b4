"""What a plan promises, in one small dict for people and the report: sharing, densities, times, warnings."""

from __future__ import annotations

from typing import Any

import numpy as np

from blendserve.planner.output_lengths import SOURCES, OutputLengths
from blendserve.planner.performance_model import Hardware
from blendserve.planner.plan_files import ScheduledRows
from blendserve.planner.requests import RequestStates


def summarize(
    scheduled: ScheduledRows,
    states: RequestStates,
    lengths: OutputLengths,
    hardware: Hardware,
    *,
    cache_tokens: int,
    has_prefix_cache: bool,
    predicted_seconds: float,
    overlapped_seconds: float,
) -> dict[str, Any]:
    """Counts, sharing (of prompt tokens), densities (compute over memory time), seconds, and warnings.

    `cache_tokens`: what the KV cache holds on `hardware`. `predicted_seconds`: of all shards together;
    `overlapped_seconds`: the same if compute and memory work didn't slow each other down.
    """
    schedule, rows = scheduled.schedule, scheduled.rows
    num_prompt_tokens = int(states.num_prompt_tokens[rows].sum())
    compute = float(schedule.compute_seconds.sum())
    memory = float(schedule.memory_seconds.sum())
    sources = np.bincount(lengths.source[rows], minlength=len(SOURCES))
    summary: dict[str, Any] = {
        "num_requests": len(rows),
        "num_duplicates": int(states.is_duplicate.sum()),
        "num_completed": int(states.is_completed.sum()),
        "num_prompt_tokens": num_prompt_tokens,
        "estimated_output_tokens": int(scheduled.estimated_output_tokens.sum(dtype=np.int64)),
        "output_length_sources": {str(name): int(count) for name, count in zip(SOURCES, sources, strict=True)},
        "has_prefix_cache": has_prefix_cache,
        "prefix_sharing_optimal": schedule.shared_tokens_optimal / max(num_prompt_tokens, 1),
        "prefix_sharing": int(schedule.shared_prefix_tokens.sum()) / max(num_prompt_tokens, 1),
        "density": compute / memory if memory > 0 else 0.0,
        "density_left": float(schedule.unit_density.max(initial=0.0)),
        "density_right": float(schedule.unit_density.min()) if len(rows) else 0.0,
        "compute_seconds": compute,
        "memory_seconds": memory,
        "bound_seconds": max(schedule.ideal_compute_seconds, memory),
        "predicted_seconds": predicted_seconds,
        "overlapped_seconds": overlapped_seconds,
        "num_shards": schedule.num_shards,
        "hardware": hardware.name,
        "num_too_long": int((states.num_prompt_tokens[rows] >= cache_tokens).sum()) if cache_tokens > 0 else 0,
        "does_not_fit": cache_tokens < 1,
    }
    return {**summary, "warnings": [*hardware.warnings, *_warnings(summary)]}


def _warnings(summary: dict[str, Any]) -> list[str]:
    if summary["num_requests"] == 0:
        return ["Nothing is left to run."]
    warnings = []
    if summary["density_left"] < 1:
        warnings.append("Memory-bound throughout: every request spends more time on memory; blending can't help.")
    if summary["density_right"] > 1:
        warnings.append("Compute-bound throughout: every request spends more time on compute; blending can't help.")
    if not summary["has_prefix_cache"]:
        warnings.append("There is no prefix cache: what prompts share is computed for each of them.")
    elif summary["prefix_sharing_optimal"] < 0.01:
        warnings.append("The prompts share nearly nothing: the order can't save prefill work.")
    if summary["does_not_fit"]:
        warnings.append(f"The model's weights fill the memory of {summary['hardware']}: name hardware that holds them.")
    if summary["num_too_long"]:
        warnings.append(
            f"Longer than the KV cache of {summary['hardware']}: {summary['num_too_long']:,} prompt(s), which the "
            "engine will give back as failed."
        )
    unknown = summary["output_length_sources"]["max_tokens"]
    if unknown:
        warnings.append(f"Output length unknown: {unknown:,} request(s), planned with their max_tokens.")
    return warnings
