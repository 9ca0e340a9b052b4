"""What a job has left behind for its report: its record, plans and manifests, and where the Parquet files lie.

Everything but the job's own record may be missing: a report can be asked for at any time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from blendserve.file_store import LocalStore
from blendserve.job_folder import JobFolder
from blendserve.job_record import JobRecord, read_record
from blendserve.lease import counted_files
from blendserve.manifest import PlanManifest, ShardManifest, ShardPlan, StepCosts, read_json, read_manifest


@dataclass(frozen=True, slots=True)
class ShardRun:
    """One shard of the plan, or the sample: what was planned, what came of it (`done` is None until it is through)."""

    name: str
    is_sample: bool
    planned: ShardPlan
    step_costs: StepCosts | None  # of the plan; None in plans of earlier versions
    done: ShardManifest | None
    schedule: Path  # the planned requests
    completions: Path  # folder of part-*.parquet and metrics.parquet

    @property
    def metrics(self) -> Path:
        return self.completions / "metrics.parquet"

    @property
    def completion_files(self) -> list[Path]:
        return [self.completions / name for name in counted_files(LocalStore(self.completions), "part-")]


@dataclass(frozen=True, slots=True)
class JobFiles:
    """`manifest` is None before the merge, `plan` before the plan. `runs`: the sample first, then the shards."""

    folder: JobFolder
    record: JobRecord
    manifest: dict[str, Any] | None
    plan: PlanManifest | None
    runs: tuple[ShardRun, ...]
    timings: dict[str, float]

    @property
    def shards(self) -> tuple[ShardRun, ...]:
        """The plan's shards, without the sample."""
        return tuple(run for run in self.runs if not run.is_sample)


def read_job(folder: JobFolder) -> JobFiles:
    """Raises OutputError when the folder holds no job, PlanError when one of its manifests is broken."""
    plan = _read_plan(folder.plan)
    sample = _read_plan(folder.sample)
    return JobFiles(
        folder=folder,
        record=read_record(folder),
        manifest=_read_json(folder.manifest),
        plan=plan,
        runs=(*_runs(folder.sample, sample, is_sample=True), *_runs(folder.plan, plan, is_sample=False)),
        timings=_read_json(folder.timings) or {},
    )


def read_columns(path: Path, *names: str) -> tuple[NDArray[Any], ...]:
    """The columns `names` of a Parquet file without nulls, each [num_rows]."""
    table = pq.read_table(path, columns=list(names))
    return tuple(np.asarray(table.column(name).to_numpy()) for name in names)


def _read_plan(folder: Path) -> PlanManifest | None:
    path = folder / "plan.json"
    return read_manifest(path, PlanManifest) if path.is_file() else None


def _runs(folder: Path, plan: PlanManifest | None, *, is_sample: bool) -> list[ShardRun]:
    if plan is None:
        return []
    completions = (folder / plan.completions).resolve()
    return [
        ShardRun(
            name="sample" if is_sample else f"shard {shard.shard}",
            is_sample=is_sample,
            planned=shard,
            step_costs=plan.step_costs,
            done=_read_done(completions / f"shard-{shard.shard:05d}" / "shard.json", plan.plan_id),
            schedule=folder / shard.file,
            completions=completions / f"shard-{shard.shard:05d}",
        )
        for shard in plan.shards
    ]


def _read_done(path: Path, plan_id: str) -> ShardManifest | None:
    if not path.is_file():
        return None
    done = read_manifest(path, ShardManifest)
    return done if done.plan_id == plan_id else None  # left by an earlier plan of the same job


def _read_json(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None
