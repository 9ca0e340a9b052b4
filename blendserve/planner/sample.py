"""The step `sample`: choose the requests that run first, so that output lengths are known before the plan is made."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from blendserve.job_folder import JobFolder
from blendserve.manifest import PlanManifest
from blendserve.planner.database import open_database
from blendserve.planner.length_history import recall
from blendserve.planner.output_lengths import OutputLengths, RememberedLengths
from blendserve.planner.performance_model import load_model_shape, tokens_within_a_step
from blendserve.planner.plan import schedule_rows
from blendserve.planner.plan_files import plan_id_of, shard_plans, write_plan_files
from blendserve.planner.planned_engine import plan_hardware, predictor, step_costs
from blendserve.planner.prompt_tokens import open_prompt_tokens
from blendserve.planner.requests import RequestStates, read_request_states
from blendserve.planner.stratified_sample import (
    ASSUMED_OUTPUT_TOKENS,
    MIN_SAMPLED,
    SAMPLE_TOKENS,
    choose_companions,
    draw_stratified,
)
from blendserve.spec import JobSpec

_MAX_NEW_SHARE = 0.05
_MIN_MAX_TOKENS = 16  # shorter completions aren't worth a run of their own


def write_sample_plan(folder: JobFolder, spec: JobSpec, model_folder: Path) -> int:
    """Write the plan of the sample, one shard. Returns its requests; 0: none needed, none written.

    The sampled requests run first, companions with long prompts after them: while outputs decode, there is prefill to
    do. None runs for more than SAMPLE_TOKENS; the plan lets them go on from there. The choice depends on the requests
    alone, so that a job that goes on finds the sample it has run.
    """
    hardware, shape = plan_hardware(spec, model_folder), load_model_shape(model_folder)
    with open_database(folder.work) as database:
        states = read_request_states(database, folder)
        states = replace(states, max_tokens=np.minimum(states.max_tokens, SAMPLE_TOKENS))
        sampled = choose_sample(states, spec, recall(database, folder, states))
        if len(sampled) == 0:
            return 0
        others = np.setdiff1d(np.flatnonzero(~states.is_duplicate), sampled)
        companions = choose_companions(
            states.shared_prefix_tokens,
            states.num_prompt_tokens,
            others,
            max_tokens=SAMPLE_TOKENS * tokens_within_a_step(shape, hardware),
        )
        rows = np.sort(np.concatenate([sampled, companions]))
        arrival = np.isin(rows, companions).astype(np.int64)  # first come, first served: the sampled ones came first
        mean = np.minimum(states.max_tokens, ASSUMED_OUTPUT_TOKENS).astype(np.float64)
        lengths = OutputLengths(mean, mean**2, np.zeros(len(mean), np.int64))
        one_shard = spec.model_copy(update={"shards": 1, "policy": "fcfs"})
        scheduled = schedule_rows(database, states, lengths, rows, one_shard, hardware, model_folder, arrival=arrival)
    draft = PlanManifest(
        plan_id="",
        policy=spec.policy,
        is_two_ended=False,
        model=str(model_folder),
        hardware=hardware.name,
        sampling=spec.sampling,
        engine=spec.engine,
        step_costs=step_costs(shape, hardware),
        completions="../completions/sample",
        shards=(),
        summary={"num_requests": len(rows), "num_sampled": len(sampled)},
    )
    plan_id = plan_id_of(draft.model_dump_json(), scheduled, states)
    shards = shard_plans(scheduled, states, plan_id, predictor(spec, shape, hardware))
    manifest = draft.model_copy(update={"plan_id": plan_id, "shards": shards})
    with open_prompt_tokens(folder.relation("tokenized_requests"), folder.work) as prompts:
        write_plan_files(folder.sample, manifest, scheduled, states, prompts)
    return len(rows)


def choose_sample(states: RequestStates, spec: JobSpec, remembered: RememberedLengths | None) -> NDArray[np.int64]:
    """Places in `states` (ascending) of the requests to sample; none where lengths matter little or are known.

    Where earlier runs say nothing of a small part of the requests, that part is planned with what is known of the rest.
    """
    is_unknown = ~states.is_duplicate & np.isnan(states.hints)
    if remembered is not None:
        is_new = is_unknown & ~remembered.is_known
        is_unknown = is_new if is_new.sum() > _MAX_NEW_SHARE * is_unknown.sum() else np.zeros_like(is_new)
    unknown = np.flatnonzero(is_unknown)
    is_needed = len(unknown) >= 2 * MIN_SAMPLED and not spec.ignore_eos and spec.sample_fraction > 0
    if not is_needed or int(states.max_tokens[unknown].max()) <= _MIN_MAX_TOKENS:
        return np.zeros(0, np.int64)
    num_sampled = max(MIN_SAMPLED, math.ceil(spec.sample_fraction * len(unknown)))
    return draw_stratified(states.shared_prefix_tokens, states.num_prompt_tokens, unknown, num_sampled)
