"""The step `plan`: estimate lengths, order what is left to run, cut it into shards, write plan.json last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from blendserve.engine_limits import EngineLimits
from blendserve.job_folder import JobFolder
from blendserve.manifest import PlanManifest
from blendserve.planner.database import open_database, write_relation
from blendserve.planner.learning_inputs import learning_inputs
from blendserve.planner.length_history import recall
from blendserve.planner.output_lengths import SOURCES, OutputLengths, RememberedLengths, estimate_output_lengths
from blendserve.planner.performance_model import Hardware, cost_constants, load_model_shape
from blendserve.planner.plan_files import ScheduledRows, plan_id_of, shard_plans, write_plan_files
from blendserve.planner.plan_summary import summarize
from blendserve.planner.planned_engine import (
    cache_tokens,
    plan_hardware,
    planned_limits,
    planned_machine,
    predictor,
    step_costs,
)
from blendserve.planner.predicted_usage import predict_usage
from blendserve.planner.prefix_tree import build_prefix_tree
from blendserve.planner.prompt_tokens import open_prompt_tokens, remove_prompt_tokens
from blendserve.planner.requests import RequestStates, compute_costs, read_request_states
from blendserve.planner.schedule import PlannedRequests, schedule_requests
from blendserve.schemas import OUTPUT_LENGTH_ESTIMATES, PREDICTED_USAGE, REQUEST_COSTS, REQUEST_ORDER
from blendserve.spec import JobSpec


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
        usage = PREDICTED_USAGE.empty_table()
        if len(rows) and cache_tokens(spec, shape, hardware) > 0:
            requests = planned_requests(states, lengths, rows, planned_limits(spec, hardware))
            usage = predict_usage(requests, planned_machine(spec, shape, hardware), costs)
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
    requests = planned_requests(states, lengths, rows, planned_limits(spec, hardware))
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


def planned_requests(
    states: RequestStates, lengths: OutputLengths, rows: NDArray[np.int64], limits: EngineLimits
) -> PlannedRequests:
    """The requests `rows` (places in `states`, ascending) as an engine of these `limits` will run them."""
    requests = PlannedRequests.of_rows(states, lengths, rows)
    if limits.has_prefix_cache:
        return requests
    return replace(requests, shared_prefix_tokens=np.zeros_like(requests.shared_prefix_tokens))


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
    shards, overlapped = (
        shard_plans(scheduled, states, plan_id, predictor(spec, shape, device))
        for device in (hardware, replace(hardware, interference=0.0))
    )
    summary = summarize(
        scheduled,
        states,
        lengths,
        hardware,
        cache_tokens=cache_tokens(spec, shape, hardware),
        has_prefix_cache=planned_limits(spec, hardware).has_prefix_cache,
        predicted_seconds=sum(shard.predicted_seconds for shard in shards),
        overlapped_seconds=sum(shard.predicted_seconds for shard in overlapped),
    )
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
