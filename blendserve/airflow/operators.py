"""The steps of a job as Airflow operators: each one calls the function of `blendserve.job` that it is named after.

What a task hands on is the path of the job's folder and counts; rows stay in Parquet.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from airflow.sdk import Asset, Context, conf
from airflow.sdk.exceptions import AirflowFailException

from blendserve.airflow.base import EngineOperator, FolderOperator, JobOptionsOperator, ProgressWriter, held
from blendserve.errors import ReconciliationError, UsageError

RUN_FOLDER_KEY = "blendserve_output"
_PLANNED_FROM = ("work/*", "sample/*", "plan/*", "completions/*")


class PlannedShard(TypedDict):
    """What one mapped `run_shard` task gets. `shard` is None when nothing is left to run."""

    shard: int | None
    density: float
    num_requests: int
    predicted_seconds: float


class PreflightOperator(JobOptionsOperator):
    """Check everything that can be checked before work starts: fields, input, model, output folder."""

    def run_step(self, context: Context) -> dict[str, Any]:
        from blendserve import job
        from blendserve.working_copy import working_copy

        spec = self.job_spec(context)
        limit = conf.getint("core", "max_map_length")
        if spec.shards is not None and spec.shards > limit:
            raise UsageError(
                f"Option 'shards': {spec.shards} is more than Airflow maps a task over, {limit}. "
                "Use fewer shards or raise [core] max_map_length."
            )
        with working_copy(spec.output, ()) as root:
            found = job.preflight(spec, root)
        context["ti"].xcom_push(RUN_FOLDER_KEY, spec.output)
        self.log.info("preflight passed", **found)
        return {"root": spec.output}


class ExtractOperator(JobOptionsOperator):
    """Read the input's rows and make a request of each."""

    def run_step(self, context: Context) -> dict[str, Any]:
        from blendserve import job
        from blendserve.working_copy import working_copy

        spec = self.job_spec(context)
        with held(spec.output), working_copy(spec.output, ["work/requests.parquet"]) as root:
            found = job.extract(spec, root, begun_by=f"{self.dag_id}/{context['run_id']}")
            return self.logged({**found, "root": spec.output})


class TokenizeOperator(FolderOperator):
    """Turn prompts into token ids; rows that can't become a request are set aside with a reason."""

    reads = ("work/requests.parquet", "work/tokenized_requests.parquet", "work/rejected_requests.parquet")

    def run_in(self, root: Path, context: Context) -> dict[str, Any]:
        from blendserve import job

        return self.logged(job.tokenize(root))


class AnalyzeOperator(FolderOperator):
    """Build the prefix tree."""

    reads = ("work/tokenized_requests.parquet",)

    def run_in(self, root: Path, context: Context) -> dict[str, Any]:
        from blendserve import job

        return self.logged(job.analyze(root))


class SampleOperator(EngineOperator):
    """Run a small sample first, to learn how long the completions become."""

    reads = _PLANNED_FROM

    def run_in(self, root: Path, context: Context) -> dict[str, Any]:
        from blendserve import job

        progress = ProgressWriter(self, context)
        return self.logged(job.run_sample(root, on_progress=progress, should_stop=self.should_stop))


class PlanOperator(FolderOperator):
    """Order the requests and cut them into shards; `run_shard` is mapped over what this returns.

    :param is_preview: the plan is only to be looked at; a run of the same job plans again, knowing its sample.
    """

    reads = _PLANNED_FROM

    def __init__(self, *, is_preview: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.is_preview = is_preview

    def run_in(self, root: Path, context: Context) -> list[PlannedShard]:
        from blendserve import job

        plan = job.plan(root, is_preview=self.is_preview)
        self.log.info("plan done", **plan.summary)
        limit = conf.getint("core", "max_map_length")
        if len(plan.shards) > limit and not self.is_preview:
            raise UsageError(
                f"The plan has {len(plan.shards)} shards, more than Airflow maps a task over, {limit}. Trigger again "
                f"with the same output and shards={limit}, or raise [core] max_map_length and clear this task."
            )
        shards = [
            PlannedShard(
                shard=shard.shard,
                density=round(shard.compute_seconds / shard.memory_seconds, 2) if shard.memory_seconds else 0.0,
                num_requests=shard.num_requests,
                predicted_seconds=round(shard.predicted_seconds, 1),
            )
            for shard in plan.shards
        ]
        return shards or [PlannedShard(shard=None, density=0.0, num_requests=0, predicted_seconds=0.0)]


class RunShardOperator(EngineOperator):
    """Run one shard on the engine, in a process of its own.

    Progress goes to the log and to the task's state store. When the task is killed, the engine stops within seconds
    and keeps every finished completion; the next attempt goes on from there.
    """

    template_fields: Sequence[str] = ("shard", *EngineOperator.template_fields)

    def __init__(self, *, shard: PlannedShard, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.shard = shard

    def run_step(self, context: Context) -> dict[str, Any]:
        from blendserve.working_copy import working_copy

        number = self.shard["shard"]
        if number is None:
            self.log.info("nothing is left to run: every request has its completion")
            return {"num_requests": 0}
        with working_copy(self.root, [f"plan/*shard-{number:05d}.parquet"]) as root:
            return self._run_shard(root, number, context)

    def _run_shard(self, root: Path, number: int, context: Context) -> dict[str, Any]:
        from blendserve import job
        from blendserve.job_folder import JobFolder
        from blendserve.manifest import PlanManifest, read_manifest
        from blendserve.working_copy import is_url

        folder = JobFolder(root)
        completions = None
        if is_url(self.root):  # finished rows go there at once, so that a lost worker loses none
            beside_plan = read_manifest(folder.plan / "plan.json", PlanManifest).completions
            completions = f"{self.root.rstrip('/')}/{posixpath.normpath(f'{folder.plan.name}/{beside_plan}')}"
        manifest = job.run_shard(
            folder.plan,
            number,
            on_progress=ProgressWriter(self, context),
            should_stop=self.should_stop,
            completions=completions,
        )
        return self.logged(manifest.model_dump(mode="json", exclude={"versions"}))


class MergeOperator(FolderOperator):
    """Write the results: every input row exactly once. Rows of shards that failed come out with an error."""

    def run_step(self, context: Context) -> dict[str, Any]:
        from blendserve import job
        from blendserve.working_copy import working_copy

        with held(self.root) as lease, working_copy(self.root, ("work/*", "completions/*")) as root:
            return self.logged({**job.merge(root, lease, allow_missing=True), "path": _results(self.root)})

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> Any:
        """For Airflow's OpenLineage provider: the job's input and results."""
        from blendserve.airflow.lineage import job_lineage
        from blendserve.file_store import open_store

        manifest = json.loads(open_store(self.root).read("manifest.json") or b"{}")
        return job_lineage(manifest, _results(self.root)) if manifest else None


class ReportOperator(FolderOperator):
    """Write the HTML report."""

    is_alone = False

    def run_in(self, root: Path, context: Context) -> str:
        from blendserve import job

        path = f"{self.root.rstrip('/')}/{job.report(root).name}"
        self.log.info("report", path=path)
        return path


class GateOperator(FolderOperator):
    """Declare the job done, or fail the run: when rows are missing, or when rows failed and the job asks for that.

    :param results_asset: gets an event with `rows`, `failed` and `path` once the job is done.
    """

    def __init__(self, *, results_asset: Asset | None = None, **kwargs: Any) -> None:
        super().__init__(outlets=[results_asset] if results_asset else [], **kwargs)
        self.results_asset = results_asset

    def run_step(self, context: Context) -> dict[str, Any]:
        manifest = self._finished()
        counts = manifest["counts"]
        num_without_completion = counts["failed"] + counts["rejected"]
        if num_without_completion and manifest["spec"]["on_row_error"] == "fail":
            raise AirflowFailException(
                f"{num_without_completion} of {counts['input_rows']} rows have no completion and on_row_error is "
                f"'fail'. The results in {self.root} are complete; their column 'error' says why."
            )
        if self.results_asset is not None:
            extra = {"rows": counts["input_rows"], "failed": num_without_completion, "path": _results(self.root)}
            context["outlet_events"][self.results_asset].extra = extra
        return self.logged(counts)

    def _finished(self) -> dict[str, Any]:
        from blendserve import job
        from blendserve.working_copy import working_copy

        try:
            with working_copy(self.root, ()) as root:
                return job.finish(root)
        except ReconciliationError:
            # The results are older than the completions: shards that had failed were cleared, but merge was not.
            with held(self.root) as lease, working_copy(self.root) as root:
                job.merge(root, lease)
                job.report(root)
                return job.finish(root)


def _results(root: str) -> str:
    return f"{root.rstrip('/')}/results"
