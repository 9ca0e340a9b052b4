"""The engine that a job will have, as its plan takes it to be: hardware, limits, cache, how long work takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from blendserve.engine_limits import EngineLimits, resolve_limits
from blendserve.manifest import StepCosts
from blendserve.models.config import ModelShape
from blendserve.planner.performance_model import Hardware, as_achieved, cost_constants, load_hardware, load_model_shape
from blendserve.planner.predicted_time import predict_seconds
from blendserve.planner.simulate import capacity_tokens, simulated_machine
from blendserve.planner.simulation import SimulatedMachine
from blendserve.spec import JobSpec

_BYTES_PER_ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2}


def plan_hardware(spec: JobSpec, model_folder: Path) -> Hardware:
    """The hardware that the plan's times are for, as the engine will use it: its number format, overlapped or not."""
    shape = load_model_shape(model_folder)
    hardware = as_achieved(load_hardware(spec.hardware, device=spec.device, model=shape), shape)
    return replace(
        hardware,
        bytes_per_element=_BYTES_PER_ELEMENT.get(spec.dtype, hardware.bytes_per_element),
        interference=hardware.interference if spec.overlap == "on" else 1.0,
    )


def planned_limits(spec: JobSpec, hardware: Hardware) -> EngineLimits:
    """What the engine takes on at one time there."""
    return resolve_limits(spec, is_gpu=not hardware.is_cpu)


def cache_tokens(spec: JobSpec, shape: ModelShape, hardware: Hardware) -> int:
    """Tokens that the KV cache holds: all that fits beside the weights, or no more than the job says. 0 or less where
    the weights fill the memory."""
    capacity = capacity_tokens(shape, hardware)
    if spec.num_blocks is None:
        return capacity
    return min(capacity, spec.num_blocks * planned_limits(spec, hardware).block_size)


def planned_machine(spec: JobSpec, shape: ModelShape, hardware: Hardware) -> SimulatedMachine:
    """The engine for the simulator. Raises UsageError when the weights leave no room for a KV cache."""
    limits = planned_limits(spec, hardware)
    return replace(
        simulated_machine(shape, hardware, is_overlapped=hardware.interference < 1),
        capacity_tokens=cache_tokens(spec, shape, hardware),
        max_batched_tokens=limits.max_num_batched_tokens,
        max_num_seqs=limits.max_num_seqs,
        block_size=limits.block_size,
        unplanned_batched_tokens=None,
    )


def predictor(spec: JobSpec, shape: ModelShape, hardware: Hardware) -> Callable[..., float]:
    """`predict_seconds` for the job's engine and model on `hardware`."""
    return partial(
        predict_seconds,
        hardware,
        shape,
        cache_tokens=cache_tokens(spec, shape, hardware),
        max_num_seqs=planned_limits(spec, hardware).max_num_seqs,
    )


def step_costs(shape: ModelShape, hardware: Hardware) -> StepCosts:
    """For the metrics of the engine's steps."""
    constants = cost_constants(shape, hardware)
    return StepCosts(
        seconds_per_token=constants.seconds_per_layer_token,
        seconds_per_sampled_token=constants.seconds_per_sampled_token,
        seconds_per_kv_byte=constants.seconds_per_kv_token / shape.kv_bytes_per_token(hardware.bytes_per_element),
    )
