"""`blendserve simulate`: what each policy would take on given hardware, before a GPU is booked."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from blendserve.errors import InputError, UsageError
from blendserve.models.config import ModelShape
from blendserve.planner.database import open_database
from blendserve.planner.performance_model import (
    Hardware,
    cost_constants,
    load_hardware,
    load_model_shape,
    step_floor_seconds,
    step_overhead_seconds,
)
from blendserve.planner.requests import compute_costs
from blendserve.planner.schedule import CostModel, PlannedRequests, schedule_requests
from blendserve.planner.simulated_job import SimulatedJob
from blendserve.planner.simulated_run import Lengths, run_policy
from blendserve.planner.simulation import SimulatedMachine, SimulationResult
from blendserve.planner.sorted_prompts import SortedPrompts, sort_prompts
from blendserve.spec import Policy

POLICIES: Final[tuple[Policy, ...]] = get_args(Policy)
_USABLE_MEMORY = 0.95  # of the device; the rest is activations and the runtime
_MAX_BATCHED_TOKENS: Final = 8192  # of the engine on a GPU
_MAX_OVERLAPPED_TOKENS: Final = 2048


def simulate(
    path: Path,
    *,
    model: str,
    hardware: str,
    gpus: int = 1,
    policies: tuple[Policy, ...] = POLICIES,
    lengths: Lengths = "known",
    is_overlapped: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Replay the workload at `path` for each policy, cut into one shard for each of `gpus` devices.

    Columns: `prompt_token_ids`, or `input_tokens` (then prompts share nothing), and `output_tokens`. With `lengths`
    sampled, one percent of the requests runs first and the plan knows of output lengths only what that shows.
    Raises InputError on other columns, UsageError on an unknown model, hardware or policy.
    """
    _check(gpus, policies)
    shape = load_model_shape(model)
    machine = simulated_machine(shape, load_hardware(hardware, model=shape), is_overlapped=is_overlapped)
    with TemporaryDirectory() as folder, open_database(Path(folder)) as database:
        started = time.monotonic()
        job = read_job(path, Path(folder))
        costs = partial(compute_costs, database, machine.constants)
        reading_seconds = planning_seconds = time.monotonic() - started
        runs = {}
        for policy in policies:
            run = run_policy(job, policy=policy, gpus=gpus, lengths=lengths, machine=machine, costs=costs, seed=seed)
            planning_seconds = max(planning_seconds, reading_seconds + run.planning_seconds)
            runs[policy] = summarize_run(run.results)
        bound = bound_seconds(job, costs) / gpus
    return {
        "policies": runs,
        "prefix_sharing_optimal": job.prefix_sharing,
        "bound_seconds": bound,
        "planning_seconds": planning_seconds,
        "peak_memory_bytes": _peak_memory_bytes(),
    }


def bound_seconds(job: SimulatedJob, costs: CostModel) -> float:
    """The least time for the job on one device: compute and memory time with perfect sharing and perfect overlap."""
    output = job.output_tokens.astype(np.float64)
    known = replace(job.requests, mean_output_tokens=output, mean_square_output_tokens=output**2)
    schedule = schedule_requests(known, policy="dfs", seed=0, num_shards=1, costs=costs)
    return max(schedule.ideal_compute_seconds, float(schedule.memory_seconds.sum()))


def simulated_machine(shape: ModelShape, device: Hardware, *, is_overlapped: bool) -> SimulatedMachine:
    """The machine that `device` is for the model. Raises UsageError when the weights leave no room for a KV cache."""
    constants = cost_constants(shape, device)
    weight_bytes = _weight_bytes(shape, device)
    capacity = capacity_tokens(shape, device)
    if capacity < 1:
        raise UsageError(
            f"The weights take {weight_bytes / 1e9:.0f} GB, {device.name} has {device.memory_bytes / 1e9:.0f} GB. "
            "Take a smaller model or hardware with more memory."
        )
    return SimulatedMachine(
        constants=constants,
        step_seconds=step_floor_seconds(shape, device),
        overhead_seconds=step_overhead_seconds(device),
        capacity_tokens=capacity,
        max_batched_tokens=_MAX_OVERLAPPED_TOKENS if is_overlapped else _MAX_BATCHED_TOKENS,
        interference=_interference(device) if is_overlapped else 1.0,
    )


def _weight_bytes(shape: ModelShape, device: Hardware) -> int:
    return (shape.layer_parameters + 2 * shape.head_parameters) * device.bytes_per_element


def capacity_tokens(shape: ModelShape, device: Hardware) -> int:
    """Tokens of KV cache that fit beside the weights, 0 or less where these fill the memory."""
    room = _USABLE_MEMORY * device.memory_bytes - _weight_bytes(shape, device)
    return int(room / shape.kv_bytes_per_token(device.bytes_per_element))


def _interference(device: Hardware) -> float:
    """As measured or achieved; by the data sheet the overlap is taken to be perfect."""
    return 0.0 if device.basis == "data_sheet" else device.interference


def read_job(path: Path, folder: Path) -> SimulatedJob:
    """Sort the workload at `path`. Raises InputError when a column is missing or of another type, or a length null or
    negative."""
    try:
        schema = pq.read_schema(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read as Parquet: {error}") from error
    prompts_in = next((name for name in ("prompt_token_ids", "input_tokens") if name in schema.names), None)
    if "output_tokens" not in schema.names or prompts_in is None:
        raise InputError(
            f"{path} has columns {', '.join(schema.names)}. "
            "Expected output_tokens and one of prompt_token_ids (list<int32>) and input_tokens."
        )
    outputs = _lengths(path, "output_tokens")
    prompts = _sorted(path, schema, folder) if prompts_in == "prompt_token_ids" else _unshared(path)
    output = np.maximum(outputs[prompts.file_position], 1)
    mean = output.astype(np.float64)
    requests = PlannedRequests(
        num_prompt_tokens=prompts.num_prompt_tokens,
        shared_prefix_tokens=prompts.shared_prefix_tokens.astype(np.int64),
        mean_output_tokens=mean,
        mean_square_output_tokens=mean**2,
        arrival=prompts.file_position,
    )
    return SimulatedJob(requests, output)


def summarize_run(results: list[SimulationResult]) -> dict[str, Any]:
    """Totals of one policy, whose machines ran side by side. Throughput counts input and output tokens."""
    seconds = max((result.seconds for result in results), default=0.0)
    prompt_tokens = sum(result.num_prompt_tokens for result in results)
    tokens = prompt_tokens + sum(result.num_output_tokens for result in results)
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds > 0 else 0.0,
        "prefix_sharing": sum(result.num_cached_tokens for result in results) / max(prompt_tokens, 1),
        "compute_seconds": sum(result.compute_seconds for result in results),
        "memory_seconds": sum(result.memory_seconds for result in results),
        "num_preemptions": sum(result.num_preemptions for result in results),
    }


def _lengths(path: Path, name: str) -> NDArray[np.int64]:
    lengths = pq.read_table(path, columns=[name]).column(0)
    if not (pa.types.is_integer(lengths.type) or pa.types.is_floating(lengths.type)):
        raise InputError(f"{path} has {name} of type {lengths.type}. Expected numbers of tokens.")
    is_wrong = pc.fill_null(pc.invert(pc.greater_equal(lengths, 0)), True)
    row = pc.index(is_wrong, True).as_py()
    if row >= 0:
        raise InputError(f"{path} has {name} {lengths[row]} in row {row} (counted from 0). Expected 0 or more.")
    return np.asarray(lengths.to_numpy(), dtype=np.int64)


def _sorted(path: Path, schema: pa.Schema, folder: Path) -> SortedPrompts:
    kind = schema.field("prompt_token_ids").type
    if not ((pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_integer(kind.value_type)):
        raise InputError(f"{path} has prompt_token_ids of type {kind}. Expected lists of integers.")
    return sort_prompts(path, folder)


def _unshared(path: Path) -> SortedPrompts:
    lengths = _lengths(path, "input_tokens")
    return SortedPrompts(np.arange(len(lengths)), lengths, np.zeros(len(lengths), np.int32))


def _check(gpus: int, policies: tuple[Policy, ...]) -> None:
    if gpus < 1:
        raise UsageError(f"Option 'gpus': expected at least 1, got {gpus}.")
    if not policies or (unknown := set(policies) - set(POLICIES)):
        raise UsageError(
            f"Unknown policies {sorted(unknown) if policies else '(none)'}. Expected {', '.join(POLICIES)}."
        )


def _peak_memory_bytes() -> int:
    """The most memory this process has held; Linux counts it in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
