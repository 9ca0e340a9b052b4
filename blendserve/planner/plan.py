"""The step `plan`: estimate lengths, order what is left to run, cut it into shards, write plan.json last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from blendserve.job_folder import JobFolder
from blendserve.manifest import PlanManifest, StepCosts
from blendserve.models.config import ModelShape
from blendserve.planner.database import open_database, write_relation
from blendserve.planner.learning_inputs import learning_inputs
from blendserve.planner.length_history import recall
from blendserve.planner.output_lengths import SOURCES, OutputLengths, RememberedLengths, estimate_output_lengths
from blendserve.planner.performance_model import (
    Hardware,
    as_achieved,
    cost_constants,
    load_hardware,
    load_model_shape,
)
from blendserve.planner.plan_files import ScheduledRows, plan_id_of, shard_plans, write_plan_files
from blendserve.planner.plan_summary import summarize
from blendserve.planner.predicted_time import predict_seconds
from blendserve.planner.predicted_usage import predict_usage
from blendserve.planner.prefix_tree import build_prefix_tree
from blendserve.planner.prompt_tokens import open_prompt_tokens, remove_prompt_tokens
from blendserve.planner.requests import RequestStates, compute_costs, read_request_states
from blendserve.planner.schedule import PlannedRequests, schedule_requests
from blendserve.planner.simulate import capacity_tokens
from blendserve.schemas import OUTPUT_LENGTH_ESTIMATES, PREDICTED_USAGE, REQUEST_COSTS, REQUEST_ORDER
from blendserve.spec import CPU_NUM_SEQS, GPU_NUM_SEQS, JobSpec

_BYTES_PER_ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2}


def make_plan(folder: JobFolder, spec: JobSpec, model_folder: Path) -> PlanManifest:
    """Plan what is neither completed nor a duplicate: `plan/plan.json`, its shard files, and the relations behind them.

    Raises ModelError on a config without sizes and UsageError on unknown hardware.
    """
    hardware = plan_hardware(spec, model_folder)
    with open_database(folder.work) as database:
        states = read_request_states(database, folder)
        lengths = estimate_lengths(states, spec, recall(database, folder, states))
        rows = rows_to_run(states)
        scheduled = schedule_rows(database, states, lengths, rows, spec, hardware, model_folder)
        shape = load_model_shape(model_folder)
        costs = partial(compute_costs, database, cost_constants(shape, hardware))
        requests = PlannedRequests.of_rows(states, lengths, rows)
        usage = predict_usage(requests, shape, hardware, costs)
        learning = None
        if spec.policy == "blend" and not spec.ignore_eos:
            constants = cost_constants(shape, hardware)
            files = folder.completion_files()
            learning = learning_inputs(states, lengths, constants, files, may_resume=not spec.stop)
    write_relation(folder.relation("predicted_usage"), usage, PREDICTED_USAGE)
    _write_relations(folder, scheduled, states, lengths)
    manifest = _manifest(spec, model_folder, hardware, scheduled, states, lengths)
    with open_prompt_tokens(folder.relation("tokenized_requests"), folder.work) as prompts:
        write_plan_files(folder.plan, manifest, scheduled, states, prompts, learning)
    remove_prompt_tokens(folder.work)
    return manifest


def plan_hardware(spec: JobSpec, model_folder: Path) -> Hardware:
    """The hardware that the plan's times are for, as the engine will use it: its number format, overlapped or not."""
    shape = load_model_shape(model_folder)
    hardware = as_achieved(load_hardware(spec.hardware, device=spec.device, model=shape), shape)
    return replace(
        hardware,
        bytes_per_element=_BYTES_PER_ELEMENT.get(spec.dtype, hardware.bytes_per_element),
        interference=hardware.interference if spec.overlap == "on" else 1.0,
    )


def predictor(spec: JobSpec, shape: ModelShape, hardware: Hardware) -> Callable[..., float]:
    """`predict_seconds` for the job's engine and model on `hardware`."""
    return partial(
        predict_seconds,
        hardware,
        shape,
        cache_tokens=capacity_tokens(shape, hardware),
        max_num_seqs=spec.max_num_seqs or (CPU_NUM_SEQS if hardware.name == "cpu" else GPU_NUM_SEQS),
    )


def step_costs(shape: ModelShape, hardware: Hardware) -> StepCosts:
    """For the metrics of the engine's steps."""
    constants = cost_constants(shape, hardware)
    return StepCosts(
        seconds_per_token=constants.seconds_per_layer_token,
        seconds_per_sampled_token=constants.seconds_per_sampled_token,
        seconds_per_kv_byte=constants.seconds_per_kv_token / shape.kv_bytes_per_token(hardware.bytes_per_element),
    )


def schedule_rows(
    database: duckdb.DuckDBPyConnection,
    states: RequestStates,
    lengths: OutputLengths,
    rows: NDArray[np.int64],
    spec: JobSpec,
    hardware: Hardware,
    model_folder: Path,
    *,
    arrival: NDArray[np.int64] | None = None,
) -> ScheduledRows:
    """Order `rows` (places in `states`, ascending) by the job's policy and cut them into its shards.

    `arrival` [num_rows] says who comes first under policy fcfs; None: the order of the input.
    """
    constants = cost_constants(load_model_shape(model_folder), hardware)
    requests = PlannedRequests.of_rows(states, lengths, rows)
    if arrival is not None:
        requests = replace(requests, arrival=arrival)
    schedule = schedule_requests(
        requests,
        policy=spec.policy,
        seed=spec.seed,
        num_shards=spec.shards,
        gpus=spec.gpus,
        costs=partial(compute_costs, database, constants),
    )
    rows_in_order = rows[schedule.positions]
    return ScheduledRows(schedule, rows_in_order, lengths.estimated_tokens[rows_in_order])


def rows_to_run(states: RequestStates) -> NDArray[np.int64]:
    """Places in `states`, ascending, of the requests that are neither completed nor answered by another one."""
    return np.flatnonzero(~states.is_duplicate & ~states.is_completed)


def estimate_lengths(states: RequestStates, spec: JobSpec, remembered: RememberedLengths | None) -> OutputLengths:
    """Output lengths of all requests, by what the job's rows, earlier runs and completions say."""
    return estimate_output_lengths(
        build_prefix_tree(states.shared_prefix_tokens),
        num_prompt_tokens=states.num_prompt_tokens,
        max_tokens=states.max_tokens,
        hints=states.hints,
        observed=states.observed,
        is_cut_off=states.is_cut_off,
        ignore_eos=spec.ignore_eos,
        remembered=remembered,
    )


def _manifest(
    spec: JobSpec,
    model_folder: Path,
    hardware: Hardware,
    scheduled: ScheduledRows,
    states: RequestStates,
    lengths: OutputLengths,
) -> PlanManifest:
    shape = load_model_shape(model_folder)
    draft = PlanManifest(
        plan_id="",
        policy=spec.policy,
        is_two_ended=scheduled.schedule.is_two_ended,
        model=str(model_folder),
        hardware=hardware.name,
        sampling=spec.sampling,
        engine=spec.engine,
        step_costs=step_costs(shape, hardware),
        completions="../completions",
        shards=(),
        summary={},
    )
    plan_id = plan_id_of(draft.model_dump_json(), scheduled, states)
    cache_tokens = capacity_tokens(shape, hardware)
    shards = shard_plans(scheduled, states, plan_id, predictor(spec, shape, hardware))
    seconds = sum(shard.predicted_seconds for shard in shards)
    summary = summarize(scheduled, states, lengths, hardware, cache_tokens, seconds)
    return draft.model_copy(update={"plan_id": plan_id, "shards": shards, "summary": summary})


def _write_relations(
    folder: JobFolder, scheduled: ScheduledRows, states: RequestStates, lengths: OutputLengths
) -> None:
    """Write `output_length_estimates`, `request_costs` and `request_order` of the requests that have to run."""
    schedule, rows = scheduled.schedule, scheduled.rows
    row_index = states.row_index[rows]
    estimates: Mapping[str, Any] = {
        "row_index": row_index,
        "estimated_output_tokens": scheduled.estimated_output_tokens,
        "source": SOURCES[lengths.source[rows]],
    }
    costs: Mapping[str, Any] = {
        "row_index": row_index,
        "num_prompt_tokens": states.num_prompt_tokens[rows].astype(np.int32),
        "shared_prefix_tokens": schedule.shared_prefix_tokens.astype(np.int32),
        "estimated_output_tokens": scheduled.estimated_output_tokens,
        "compute_seconds": schedule.compute_seconds,
        "memory_seconds": schedule.memory_seconds,
        "density": schedule.compute_seconds / schedule.memory_seconds,
    }
    order: Mapping[str, Any] = {
        "plan_position": np.arange(len(rows)),
        "row_index": row_index,
        "unit_id": schedule.unit_id,
        "unit_density": schedule.unit_density,
        "shard": schedule.shard.astype(np.int32),
        "shard_position": schedule.shard_position,
    }
    for name, columns, schema in (
        ("output_length_estimates", estimates, OUTPUT_LENGTH_ESTIMATES),
        ("request_costs", costs, REQUEST_COSTS),
        ("request_order", order, REQUEST_ORDER),
    ):
        write_relation(folder.relation(name), pa.table(dict(columns), schema=schema), schema)
