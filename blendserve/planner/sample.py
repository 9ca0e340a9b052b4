"""The step `sample`: choose the requests that run first, so that output lengths are known before the plan is made."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from blendserve.job_folder import JobFolder
from blendserve.manifest import PlanManifest
from blendserve.planner.database import open_database
from blendserve.planner.output_lengths import OutputLengths, prompt_length_class
from blendserve.planner.plan import plan_hardware, schedule_rows
from blendserve.planner.plan_files import plan_id_of, shard_plans, write_plan_files
from blendserve.planner.prompt_tokens import open_prompt_tokens
from blendserve.planner.requests import RequestStates, read_request_states
from blendserve.spec import JobSpec

MIN_SAMPLED = 16
COMPANION_SHARE = 0.03  # of the prompt tokens that aren't shared
_MAX_STRATUM_SHARE = 0.05
_MIN_STRATUM_ROOM = 8
_MIN_MAX_TOKENS = 16  # shorter completions aren't worth a run of their own
ASSUMED_OUTPUT_TOKENS = 512  # before anything is known; a longer one is the engine's to absorb


def write_sample_plan(folder: JobFolder, spec: JobSpec, model_folder: Path) -> int:
    """Write the plan of the sample, one shard. Returns its requests; 0: none needed, none written.

    The sampled requests run first, companions with long prompts after them: while the last long outputs decode, there
    is prefill to do. The choice depends on the requests alone, so that a job that goes on finds the sample it has run.
    """
    hardware = plan_hardware(spec, model_folder)
    with open_database(folder.work) as database:
        states = read_request_states(database, folder)
        sampled = choose_sample(states, spec)
        if len(sampled) == 0:
            return 0
        others = np.setdiff1d(np.flatnonzero(~states.is_duplicate), sampled)
        companions = choose_companions(states.shared_prefix_tokens, states.num_prompt_tokens, others)
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
        completions="../completions/sample",
        shards=(),
        summary={"num_requests": len(rows), "num_sampled": len(sampled)},
    )
    plan_id = plan_id_of(draft.model_dump_json(), scheduled, states)
    manifest = draft.model_copy(
        update={"plan_id": plan_id, "shards": shard_plans(scheduled, states, plan_id, hardware)}
    )
    with open_prompt_tokens(folder.relation("tokenized_requests"), folder.work) as prompts:
        write_plan_files(folder.sample, manifest, scheduled, states, prompts)
    return len(rows)


def choose_sample(states: RequestStates, spec: JobSpec) -> NDArray[np.int64]:
    """Places in `states` (ascending) of the requests to sample; none where lengths matter little or are known."""
    unknown = np.flatnonzero(~states.is_duplicate & np.isnan(states.hints))
    is_needed = len(unknown) >= 2 * MIN_SAMPLED and not spec.ignore_eos and spec.sample_fraction > 0
    if not is_needed or int(states.max_tokens[unknown].max()) <= _MIN_MAX_TOKENS:
        return np.zeros(0, np.int64)
    num_sampled = max(MIN_SAMPLED, math.ceil(spec.sample_fraction * len(unknown)))
    return draw_stratified(states.shared_prefix_tokens, states.num_prompt_tokens, unknown, num_sampled)


def choose_companions(
    shared_prefix_tokens: NDArray[np.int64], num_prompt_tokens: NDArray[np.int64], candidates: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Those of the sorted places `candidates` that prefill most tokens of their own: COMPANION_SHARE of the job's."""
    shared = np.maximum(shared_prefix_tokens, np.append(shared_prefix_tokens[1:], 0))
    own = num_prompt_tokens - shared
    longest_first = candidates[np.argsort(-own[candidates], kind="stable")]
    num_chosen = np.searchsorted(np.cumsum(own[longest_first]), COMPANION_SHARE * own.sum(), side="right")
    return longest_first[:num_chosen]


def draw_stratified(
    shared_prefix_tokens: NDArray[np.int64],
    num_prompt_tokens: NDArray[np.int64],
    candidates: NDArray[np.int64],
    num_sampled: int,
) -> NDArray[np.int64]:
    """`num_sampled` of the sorted places `candidates` (at most all of them), ascending; always the same ones.

    Strata are the subtrees below what all prompts share; prompts that share no more are put together by their length.
    Each stratum gets room by the square root of its size, so that small ones are seen and big ones are seen more often,
    but not so much that a good part of a small one runs before it can be planned. Within a stratum the sample is spread
    evenly.
    """
    num_sampled = min(num_sampled, len(candidates))
    candidates, stratum = _strata(shared_prefix_tokens, num_prompt_tokens, candidates)
    sizes = np.bincount(stratum)
    least = np.minimum(sizes, _MIN_STRATUM_ROOM) * min(num_sampled / (2 * _MIN_STRATUM_ROOM * len(sizes)), 1.0)
    room = least + (num_sampled - least.sum()) * np.sqrt(sizes) / np.sqrt(sizes).sum()
    room = np.minimum(room, np.maximum(_MAX_STRATUM_SHARE * sizes, _MIN_STRATUM_ROOM))
    filled = np.cumsum((room / np.maximum(sizes, 1))[stratum])
    marks = _spread(float(filled[-1]), min(round(float(filled[-1])), num_sampled))
    chosen = np.unique(np.minimum(np.searchsorted(filled, marks), len(candidates) - 1))
    others = np.setdiff1d(np.arange(len(candidates)), chosen)
    more = others[_spread(len(others), num_sampled - len(chosen)).astype(np.int64)]
    return np.sort(candidates[np.concatenate([chosen, more])])


def _strata(
    shared_prefix_tokens: NDArray[np.int64], num_prompt_tokens: NDArray[np.int64], candidates: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`candidates` sorted by stratum, and the stratum of each, numbered in that order."""
    least_shared = shared_prefix_tokens[1:].min(initial=int(shared_prefix_tokens.max(initial=0)))
    subtree = np.cumsum(shared_prefix_tokens <= least_shared)
    is_alone = np.bincount(subtree)[subtree] == 1
    key = np.where(is_alone, -prompt_length_class(num_prompt_tokens), subtree)[candidates]
    order = np.argsort(key, kind="stable")
    return candidates[order], np.unique(key[order], return_inverse=True)[1].reshape(-1)


def _spread(length: float, num_marks: int) -> NDArray[np.float64]:
    """`num_marks` evenly spaced marks on [0, length)."""
    return np.arange(0.5, num_marks, dtype=np.float64) * (length / max(num_marks, 1))
