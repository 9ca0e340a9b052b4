"""The steps of a job as Airflow operators: each one calls the function of `blendserve.job` that it is named after.

Nothing heavy is imported at module level, because Airflow parses DAG files every few seconds. What a task hands on is
the path of the job's folder and counts; rows stay in Parquet.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from airflow.sdk import Asset, BaseOperator, Context, conf
from airflow.sdk.exceptions import AirflowFailException
from airflow.sdk.log import mask_secret

from blendserve.airflow import configuration
from blendserve.airflow.job_options import job_spec, secrets_in
from blendserve.errors import BlendServeError, ReconciliationError, UsageError
from blendserve.spec import JobSpec

RUN_FOLDER_KEY = "blendserve_output"
PROGRESS_KEY = "blendserve_progress"
NOT_WORTH_A_RETRY = (UsageError.exit_status,)


class PlannedShard(TypedDict):
    """What one mapped `run_shard` task gets. `shard` is None when nothing is left to run."""

    shard: int | None
    density: float
    num_requests: int
    predicted_seconds: float


class BlendServeOperator(BaseOperator):  # type: ignore[misc]
    """Base of all steps: an error that a retry can't mend fails the task at once."""

    ui_color = "#e8f1fb"

    def execute(self, context: Context) -> Any:
        try:
            return self.run_step(context)
        except BlendServeError as error:
            if error.exit_status in NOT_WORTH_A_RETRY:
                raise AirflowFailException(str(error)) from error
            raise

    def run_step(self, context: Context) -> Any:
        raise NotImplementedError


class JobOptionsOperator(BlendServeOperator):
    """Base of the two steps that start from what the user asked for.

    :param options: fields of `JobSpec` by name; strings are Airflow templates (`{{ ds }}`), except `template`.
    :param use_params: the run's params (the trigger form) win over `options`.
    """

    template_fields: Sequence[str] = ("options",)

    def __init__(self, *, options: dict[str, Any] | None = None, use_params: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        stated = dict(options or {})
        self.prompt_template = stated.pop("template", None)
        self.options = stated
        self.use_params = use_params

    def render_template_fields(self, context: Context, jinja_env: Any = None) -> None:
        """As usual; passwords in URLs are hidden from then on, in the rendered fields and in logs."""
        super().render_template_fields(context, jinja_env)
        for secret in secrets_in(self.options):
            mask_secret(secret)

    def job_spec(self, context: Context) -> JobSpec:
        options = dict(self.options)
        if self.prompt_template is not None:
            options["template"] = self.prompt_template
        form = dict(context["params"]) if self.use_params else {}
        return job_spec(options, form, context["run_id"])


class PreflightOperator(JobOptionsOperator):
    """Check everything that can be checked before work starts: fields, input, model, output folder."""

    def run_step(self, context: Context) -> dict[str, Any]:
        from blendserve import job

        spec = self.job_spec(context)
        limit = conf.getint("core", "max_map_length")
        if spec.shards is not None and spec.shards > limit:
            raise UsageError(
                f"Option 'shards': {spec.shards} is more than Airflow maps a task over, {limit}. "
                "Use fewer shards or raise [core] max_map_length."
            )
        found = job.preflight(spec)
        context["ti"].xcom_push(RUN_FOLDER_KEY, spec.output)
        self.log.info("preflight passed", **found)
        return {"root": spec.output}


class ExtractOperator(JobOptionsOperator):
    """Read the input's rows and make a request of each."""

    def run_step(self, context: Context) -> dict[str, Any]:
        from blendserve import job

        return _logged(self, job.extract(self.job_spec(context)))


class FolderOperator(BlendServeOperator):
    """Base of the steps that need nothing but the job's folder.

    :param root: the job's output folder.
    """

    template_fields: Sequence[str] = ("root",)

    def __init__(self, *, root: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = root


class TokenizeOperator(FolderOperator):
    """Turn prompts into token ids; rows that can't become a request are set aside with a reason."""

    def run_step(self, context: Context) -> dict[str, Any]:
        from blendserve import job

        return _logged(self, job.tokenize(Path(self.root)))


class AnalyzeOperator(FolderOperator):
    """Build the prefix tree."""

    def run_step(self, context: Context) -> dict[str, Any]:
        from blendserve import job

        return _logged(self, job.analyze(Path(self.root)))


class ProgressWriter:
    """Writes a running engine's progress to the task's log and to its state store, every few seconds."""

    def __init__(self, operator: BlendServeOperator, context: Context) -> None:
        self._log = operator.log
        self._store = context["task_state_store"]
        self._every_seconds = configuration.get_integer("log_progress_seconds")
        self._last_written = float("-inf")

    def __call__(self, progress: dict[str, Any]) -> None:
        if time.monotonic() - self._last_written < self._every_seconds:
            return
        self._last_written = time.monotonic()
        values = {name: value for name, value in progress.items() if name != "event"}
        self._log.info("progress", **values)
        self._store.set(PROGRESS_KEY, values)


class EngineOperator(FolderOperator):
    """Base of the steps that run the engine: it stops within seconds when the task is killed."""

    _must_stop = False

    def on_kill(self) -> None:
        self._must_stop = True

    def should_stop(self) -> bool:
        return self._must_stop


class SampleOperator(EngineOperator):
    """Run a small sample first, to learn how long the completions become."""

    def run_step(self, context: Context) -> dict[str, Any]:
        from blendserve import job

        progress = ProgressWriter(self, context)
        return _logged(self, job.run_sample(Path(self.root), on_progress=progress, should_stop=self.should_stop))


class PlanOperator(FolderOperator):
    """Order the requests and cut them into shards; `run_shard` is mapped over what this returns.

    :param is_preview: the plan is only to be looked at; a run of the same job plans again, knowing its sample.
    """

    def __init__(self, *, is_preview: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.is_preview = is_preview

    def run_step(self, context: Context) -> list[PlannedShard]:
        from blendserve import job

        plan = job.plan(Path(self.root), is_preview=self.is_preview)
        self.log.info("plan done", **plan.summary)
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

    template_fields: Sequence[str] = ("root", "shard")

    def __init__(self, *, shard: PlannedShard, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.shard = shard

    def run_step(self, context: Context) -> dict[str, Any]:
        from blendserve import job
        from blendserve.job_folder import JobFolder

        number = self.shard["shard"]
        if number is None:
            self.log.info("nothing is left to run: every request has its completion")
            return {"num_requests": 0}
        manifest = job.run_shard(
            JobFolder(Path(self.root)).plan,
            number,
            on_progress=ProgressWriter(self, context),
            should_stop=self.should_stop,
        )
        return _logged(self, manifest.model_dump(mode="json", exclude={"versions"}))


class MergeOperator(FolderOperator):
    """Write the results: every input row exactly once. Rows of shards that failed come out with an error."""

    def run_step(self, context: Context) -> dict[str, Any]:
        from blendserve import job

        return _logged(self, job.merge(Path(self.root), allow_missing=True))


class ReportOperator(FolderOperator):
    """Write the HTML report."""

    def run_step(self, context: Context) -> str:
        from blendserve import job

        path = job.report(Path(self.root))
        self.log.info("report", path=str(path))
        return str(path)


class GateOperator(FolderOperator):
    """Declare the job done, or fail the run: when rows are missing, or when rows failed and the job asks for that.

    :param results_asset: gets an event with `rows`, `failed` and `path` once the job is done.
    """

    def __init__(self, *, results_asset: Asset | None = None, **kwargs: Any) -> None:
        super().__init__(outlets=[results_asset] if results_asset else [], **kwargs)
        self.results_asset = results_asset

    def run_step(self, context: Context) -> dict[str, Any]:
        from blendserve.job_folder import JobFolder

        manifest = self._finished(Path(self.root))
        counts = manifest["counts"]
        num_without_completion = counts["failed"] + counts["rejected"]
        if num_without_completion and manifest["spec"]["on_row_error"] == "fail":
            raise AirflowFailException(
                f"{num_without_completion} of {counts['input_rows']} rows have no completion and on_row_error is "
                f"'fail'. The results in {self.root} are complete; their column 'error' says why."
            )
        if self.results_asset is not None:
            path = str(JobFolder(Path(self.root)).results)
            extra = {"rows": counts["input_rows"], "failed": num_without_completion, "path": path}
            context["outlet_events"][self.results_asset].extra = extra
        return _logged(self, counts)

    def _finished(self, root: Path) -> dict[str, Any]:
        from blendserve import job

        try:
            return job.finish(root)
        except ReconciliationError:
            # The results are older than the completions: shards that had failed were cleared, but merge was not.
            job.merge(root)
            job.report(root)
            return job.finish(root)


def _logged(operator: BlendServeOperator, found: dict[str, Any]) -> dict[str, Any]:
    operator.log.info(f"{operator.task_id} done", **found)
    return found
