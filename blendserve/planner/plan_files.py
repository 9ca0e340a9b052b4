"""Writing a plan: shard files with their prompts, and `plan.json` last, so that a crash leaves an old or a new plan."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from blendserve.manifest import PlanManifest, ShardPlan, replacing, write_manifest
from blendserve.planner.learning_inputs import LearningInputs
from blendserve.planner.prompt_tokens import PromptTokens
from blendserve.planner.requests import RequestStates
from blendserve.planner.schedule import Schedule
from blendserve.schemas import SCHEDULED_REQUESTS

_BATCH_TOKENS = 2**20
_WRITERS: Final = 2  # shards written at one time: encoding takes a core for each
# Token ids hardly repeat within a page: a dictionary of them takes five times as long to write and saves little.
_FORMAT: Final[dict[str, Any]] = {"use_dictionary": False, "compression": "zstd", "compression_level": 1}


@dataclass(frozen=True, slots=True)
class ScheduledRows:
    """A schedule with the rows it stands for: `rows` [num_requests] are places in the request states."""

    schedule: Schedule
    rows: NDArray[np.int64]
    estimated_output_tokens: NDArray[np.int32]

    def shard_range(self, shard: int) -> slice:
        begin, end = np.searchsorted(self.schedule.shard, [shard, shard + 1])
        return slice(int(begin), int(end))


def write_plan_files(
    folder: Path,
    manifest: PlanManifest,
    scheduled: ScheduledRows,
    states: RequestStates,
    prompts: PromptTokens,
    learning: LearningInputs | None = None,
) -> None:
    """Write the shard files that `manifest` names, then `plan.json`, then remove what earlier plans left.

    `learning`: what the engine learns output lengths from; None: it takes them as they are estimated.
    """
    schema = SCHEDULED_REQUESTS if learning is None else learning.schema()

    def write(shard: ShardPlan) -> None:
        with (
            replacing(folder / shard.file) as temporary,
            pq.ParquetWriter(temporary, schema, **_FORMAT) as file,
        ):
            for batch in _shard_batches(scheduled, shard.shard, states, prompts, learning):
                file.write_table(batch.cast(schema))

    with ThreadPoolExecutor(_WRITERS) as writers:
        list(writers.map(write, manifest.shards))
    write_manifest(folder / "plan.json", manifest)
    kept = {(folder / shard.file).parent for shard in manifest.shards}
    for stale in folder.glob("shards-*"):
        if stale not in kept:
            shutil.rmtree(stale)


def shard_plans(
    scheduled: ScheduledRows, states: RequestStates, plan_id: str, predict: Callable[..., float]
) -> tuple[ShardPlan, ...]:
    """What each shard holds and should take; `predict` is `predict_seconds` for the device and the model."""
    plans = []
    for shard in range(scheduled.schedule.num_shards):
        part = scheduled.shard_range(shard)
        compute = float(scheduled.schedule.compute_seconds[part].sum())
        memory = float(scheduled.schedule.memory_seconds[part].sum())
        num_prompt_tokens = states.num_prompt_tokens[scheduled.rows[part]]
        output_tokens = scheduled.estimated_output_tokens[part]
        plans.append(
            ShardPlan(
                shard=shard,
                file=f"shards-{plan_id}/shard-{shard:05}.parquet",
                num_requests=part.stop - part.start,
                num_prompt_tokens=int(num_prompt_tokens.sum()),
                estimated_output_tokens=int(output_tokens.sum(dtype=np.int64)),
                compute_seconds=compute,
                memory_seconds=memory,
                predicted_seconds=predict(
                    compute_seconds=compute,
                    memory_seconds=memory,
                    num_prompt_tokens=num_prompt_tokens,
                    output_tokens=output_tokens,
                ),
            )
        )
    return tuple(plans)


def plan_id_of(settings: str, scheduled: ScheduledRows, states: RequestStates) -> str:
    """A hash of everything that the plan says: same requests, order and settings, same id."""
    digest = hashlib.sha256(settings.encode())
    columns = (states.row_index[scheduled.rows], scheduled.schedule.shard, scheduled.estimated_output_tokens)
    for column in columns:
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()[:16]


def _shard_batches(
    scheduled: ScheduledRows,
    shard: int,
    states: RequestStates,
    prompts: PromptTokens,
    learning: LearningInputs | None,
) -> Iterator[pa.Table]:
    part = scheduled.shard_range(shard)
    tokens = np.cumsum(states.num_prompt_tokens[scheduled.rows[part]])
    begin = part.start
    while begin < part.stop:
        before = tokens[begin - part.start - 1] if begin > part.start else 0
        end = part.start + int(np.searchsorted(tokens, before + _BATCH_TOKENS, side="right"))
        end = max(end, begin + 1)
        yield _batch(scheduled, slice(begin, end), states, prompts, learning)
        begin = end


def _batch(
    scheduled: ScheduledRows,
    part: slice,
    states: RequestStates,
    prompts: PromptTokens,
    learning: LearningInputs | None,
) -> pa.Table:
    rows, schedule = scheduled.rows[part], scheduled.schedule
    nothing = pa.nulls(len(rows), SCHEDULED_REQUESTS.field("length_classes").type)
    columns = {
        "shard_position": schedule.shard_position[part],
        "row_index": states.row_index[rows],
        "request_id": states.request_id.take(pa.array(rows)),
        "prompt_token_ids": prompts.take(states.file_position[rows]),
        "max_tokens": states.max_tokens[rows].astype(np.int32),
        "estimated_output_tokens": scheduled.estimated_output_tokens[part],
        "shared_prefix_tokens": schedule.shared_prefix_tokens[part].astype(np.int32),
        "compute_seconds": schedule.compute_seconds[part],
        "memory_seconds": schedule.memory_seconds[part],
        "unit_id": schedule.unit_id[part],
        "unit_density": schedule.unit_density[part],
        "num_prompt_tokens": states.num_prompt_tokens[rows].astype(np.int32),
        "generated_token_ids": nothing if learning is None else learning.begun_of(rows),
        "length_classes": nothing if learning is None else learning.classes_of(rows),
    }
    return pa.table(columns, schema=SCHEDULED_REQUESTS)
