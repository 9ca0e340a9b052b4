"""A job's folder as the steps would leave it, in the schemas' exact shape, written without running anything."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blendserve import schemas
from blendserve.job_folder import JobFolder
from blendserve.job_record import JobRecord
from blendserve.manifest import PlanManifest, ShardManifest, ShardPlan, StepCosts, write_manifest
from blendserve.planner.prefix_tree import build_prefix_tree
from blendserve.spec import EngineSpec, JobSpec, SamplingSpec

PROMPT, COMPLETION = "Secret prompt of row", "Secret completion of row"
GROUP_TOKENS = 64  # requests come in groups that share this many tokens
GROUP_REQUESTS = 5
SUMMARY = {
    "prefix_sharing_optimal": 0.4,
    "prefix_sharing": 0.396,
    "density": 1.27,
    "density_left": 3.73,
    "density_right": 0.096,
    "compute_seconds": 50.0,
    "memory_seconds": 40.0,
    "bound_seconds": 52.5,
    "predicted_seconds": 61.0,
    "hardware": "cpu",
    "warnings": ["estimates are rough"],
}


@dataclass
class JobWriter:
    """Writes one job's files. Rows: first the requests that run, then the failed, rejected and duplicate ones."""

    root: Path
    num_requests: int = 40
    num_shards: int = 2
    num_sampled: int = 5
    num_failed: int = 1
    num_duplicates: int = 3
    rejections: tuple[str, ...] = ("the prompt is empty", "the prompt is empty", "the prompt is null")
    failure: str = "the model fails: '<script>alert(1)</script>' & <b>bold</b>"
    num_steps: int = 30
    policy: str = "blend"
    step_costs: StepCosts | None = None
    spec: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> JobFolder:
        return JobFolder(self.root)

    @property
    def counts(self) -> dict[str, int]:
        return {
            "input_rows": self.num_requests + self.num_duplicates + len(self.rejections),
            "succeeded": self.num_requests - self.num_failed,
            "failed": self.num_failed,
            "rejected": len(self.rejections),
            "duplicates_resolved": self.num_duplicates,
            "missing": 0,
        }

    def write(self) -> JobFolder:
        """All of it."""
        self.write_record()
        self.write_tree()
        self.write_plan()
        self.write_predicted_usage(20 if self.num_shards else 0)
        for name, shard, rows in self.runs():
            self.write_run(name, shard, rows)
        self.write_results()
        return self.folder

    def runs(self) -> list[tuple[str, int, np.ndarray]]:
        """(plan's folder, shard, rows) of the sample and of every shard."""
        sampled, planned = np.split(np.arange(self.num_requests), [self.num_sampled])
        shards = np.array_split(planned, self.num_shards) if self.num_shards else []
        return [("sample", 0, sampled)] * bool(self.num_sampled) + [("plan", i, rows) for i, rows in enumerate(shards)]

    def write_record(self) -> None:
        spec = JobSpec(input="s3://key:password@bucket/in.parquet", output=str(self.root), **self.spec)
        record = JobRecord(spec=spec, model_folder="/models/smollm2", identity={}, fingerprint="f1e2d3c4" * 8)
        write_manifest(self.folder.job, record)
        write_manifest(self.folder.timings, {"extract": 0.4, "tokenize": 1.2, "analyze": 0.3, "merge": 0.2})

    def write_tree(self) -> None:
        num_rows = self.num_requests + self.num_duplicates
        position = np.arange(num_rows)
        shared = np.where(position % GROUP_REQUESTS == 0, 16, GROUP_TOKENS) * (position > 0)
        duplicate_of = [None] * self.num_requests + [0] * self.num_duplicates
        self._write(
            self.folder.relation("sorted_requests"),
            schemas.SORTED_REQUESTS,
            sort_position=position,
            row_index=position,
            num_prompt_tokens=np.full(num_rows, 100),
            shared_prefix_tokens=shared,
            duplicate_of=duplicate_of,
        )
        nodes = build_prefix_tree(shared).to_table() if num_rows else self._lone_root()
        pq.write_table(nodes, self.folder.relation("prefix_nodes"))

    def _lone_root(self) -> pa.Table:
        row = {"node_id": 0, "parent_id": None, "depth_tokens": 0, "edge_tokens": 0, "first_position": 0}
        return pa.Table.from_pylist([{**row, "num_requests": 0}], schema=schemas.PREFIX_NODES)

    def write_plan(self) -> None:
        for name in ("sample", "plan"):
            runs = [(shard, rows) for folder, shard, rows in self.runs() if folder == name]
            if runs or name == "plan":
                self._write_plan(name, runs)
        planned = [(shard, row) for name, shard, rows in self.runs() if name == "plan" for row in rows]
        shards, rows = (np.array([pair[i] for pair in planned], np.int64) for i in (0, 1))
        position = np.arange(len(rows))
        self._write(
            self.folder.relation("request_order"),
            schemas.REQUEST_ORDER,
            plan_position=position,
            row_index=rows,
            unit_id=rows // GROUP_REQUESTS,
            unit_density=4.0 * 0.9 ** (rows // GROUP_REQUESTS),
            shard=shards,
            shard_position=position,
        )
        every = np.arange(self.num_requests)
        self._write(
            self.folder.relation("output_length_estimates"),
            schemas.OUTPUT_LENGTH_ESTIMATES,
            row_index=every,
            estimated_output_tokens=8 + every % 7,
            source=["hint" if row % 2 else "sample" for row in every],
        )

    def write_predicted_usage(self, num_pieces: int = 20) -> None:
        seconds = np.arange(num_pieces, dtype=np.float64)
        self._write(
            self.folder.relation("predicted_usage"),
            schemas.PREDICTED_USAGE,
            policy=["blend"] * num_pieces + ["dfs"] * num_pieces,
            started_seconds=np.concatenate([seconds, 2 * seconds]),
            compute_share=np.concatenate([np.ones(num_pieces), seconds < num_pieces / 2]).astype(np.float64),
            memory_share=np.concatenate([np.ones(num_pieces), seconds >= num_pieces / 2]).astype(np.float64),
            cache_share=np.full(2 * num_pieces, 0.7),
        )

    def _write_plan(self, name: str, runs: list[tuple[int, np.ndarray]]) -> None:
        shards = tuple(
            ShardPlan(
                shard=shard,
                file=f"shards/shard-{shard:05d}.parquet",
                num_requests=len(rows),
                num_prompt_tokens=100 * len(rows),
                estimated_output_tokens=10 * len(rows),
                compute_seconds=2.0,
                memory_seconds=1.0,
                predicted_seconds=3.0 + shard,
            )
            for shard, rows in runs
        )
        plan = PlanManifest(
            plan_id=f"{name}-1",
            policy=self.policy,
            is_two_ended=self.policy == "blend",
            model="/models/smollm2",
            hardware="cpu",
            sampling=SamplingSpec(),
            engine=EngineSpec(),
            step_costs=self.step_costs,
            completions="../completions/sample" if name == "sample" else "../completions",
            shards=shards,
            summary=SUMMARY if runs else {},
        )
        write_manifest(self.root / name / "plan.json", plan)
        for shard, rows in runs:
            self._write(
                self.root / name / "shards" / f"shard-{shard:05d}.parquet",
                schemas.SCHEDULED_REQUESTS,
                shard_position=np.arange(len(rows)),
                row_index=rows,
                request_id=[f"id-{row}" for row in rows],
                prompt_token_ids=[[1, 2, 3] for _ in rows],
                max_tokens=np.full(len(rows), 32),
                estimated_output_tokens=8 + rows % 7,
                shared_prefix_tokens=np.full(len(rows), 40),
                compute_seconds=np.ones(len(rows)),
                memory_seconds=np.ones(len(rows)),
                unit_id=rows // GROUP_REQUESTS,
                unit_density=np.ones(len(rows)),
                num_prompt_tokens=np.full(len(rows), 3),
                generated_token_ids=[None] * len(rows),
                length_classes=[None] * len(rows),
            )

    def write_run(self, name: str, shard: int, rows: np.ndarray) -> None:
        completions = self.folder.completions / ("sample" if name == "sample" else "") / f"shard-{shard:05d}"
        is_failed = rows >= self.num_requests - self.num_failed
        self._write(
            completions / "part-00000.parquet",
            schemas.COMPLETIONS,
            row_index=rows,
            request_id=[f"id-{row}" for row in rows],
            completion=[None if failed else f"{COMPLETION} {row}" for row, failed in zip(rows, is_failed, strict=True)],
            completion_token_ids=[[4, 5] for _ in rows],
            finish_reason=["error" if failed else "stop" for failed in is_failed],
            error=[self.failure if failed else None for failed in is_failed],
            num_prompt_tokens=np.full(len(rows), 100),
            num_cached_tokens=np.full(len(rows), 32),
            num_completion_tokens=np.where(is_failed, 0, 6 + rows % 11),
        )
        done = ShardManifest(
            plan_id=f"{name}-1",
            shard=shard,
            status="done",
            num_requests=len(rows),
            num_succeeded=int((~is_failed).sum()),
            num_failed=int(is_failed.sum()),
            num_resumed=0,
            num_prompt_tokens=100 * len(rows),
            num_cached_tokens=32 * len(rows),
            num_completion_tokens=10 * len(rows),
            num_preemptions=2,
            num_steps=self.num_steps,
            seconds=4.0 + shard,
            device="cpu",
            versions={},
        )
        write_manifest(completions / "shard.json", done)
        self._write_metrics(completions / "metrics.parquet", np.random.default_rng(shard))

    def _write_metrics(self, path: Path, random: np.random.Generator) -> None:
        took = random.uniform(0.01, 0.03, self.num_steps)
        running = random.integers(20, 60, self.num_steps)
        self._write(
            path,
            schemas.STEP_METRICS,
            step=np.arange(self.num_steps),
            started_seconds=np.cumsum(took) - took,
            step_seconds=took,
            num_prefill_tokens=random.integers(0, 400, self.num_steps),
            num_decode_tokens=running,
            num_running=running,
            num_running_left=running // 3,
            num_waiting=np.arange(self.num_steps)[::-1],
            num_used_blocks=random.integers(700, 1000, self.num_steps),
            num_total_blocks=np.full(self.num_steps, 1000),
            num_cached_tokens=np.zeros(self.num_steps, np.int64),
            num_preempted=(np.arange(self.num_steps) == 3).astype(int),
            kv_read_bytes=running * 1_000_000,
        )

    def write_results(self) -> None:
        """Input columns and result columns, and the manifest."""
        num_ran, num_rows = self.num_requests + self.num_duplicates, self.counts["input_rows"]
        failed = range(self.num_requests - self.num_failed, self.num_requests)
        errors = [self.failure if row in failed else None for row in range(num_ran)] + list(self.rejections)
        reasons = ["error" if error else "stop" for error in errors[:num_ran]] + ["rejected"] * len(self.rejections)
        columns = {
            "request_id": pa.array([f"id-{row}" for row in range(num_rows)], pa.string()),
            "prompt": pa.array([f"{PROMPT} {row}" for row in range(num_rows)], pa.string()),
            "completion": pa.array([None if error else COMPLETION for error in errors], pa.string()),
            "finish_reason": pa.array(reasons, pa.string()),
            "error": pa.array(errors, pa.string()),
        }
        self.folder.results.mkdir(parents=True)
        pq.write_table(pa.table(columns), self.folder.results / "part-00000.parquet")
        manifest = {
            "status": "done",
            "counts": self.counts,
            "tokens": {"num_prompt_tokens": 123_456, "num_cached_tokens": 45_678, "num_completion_tokens": 7_890},
            "fingerprint": "f1e2d3c4" * 8,
            "versions": {"blendserve": "0.1.0", "duckdb": "2.0.0"},
        }
        write_manifest(self.folder.manifest, manifest)

    @staticmethod
    def _write(path: Path, schema: pa.Schema, **columns: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = [pa.array(columns[kind.name], from_pandas=True).cast(kind.type) for kind in schema]
        pq.write_table(pa.Table.from_arrays(arrays, schema=schema), path)


@pytest.fixture
def job(tmp_path: Path) -> JobWriter:
    """A small job to write, whole or in part."""
    return JobWriter(tmp_path / "job")
