"""The steps of a job as one task group, for any DAG.

    with DAG("nightly_summaries", schedule="@daily"):
        BlendServeBatch(
            input="/data/articles/{{ ds }}.parquet",
            output="/data/summaries/{{ ds }}",
            model="/models/llama-3-8b",
            template="Summarize in one sentence: {{ body }}",
        )

Options are the fields of `JobSpec`. Strings are Airflow templates, except `template`, which is Jinja over the rows.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import Asset, RetryPolicy, TaskGroup
from pydantic import ValidationError

from blendserve.airflow import configuration
from blendserve.airflow.base import plain_options
from blendserve.airflow.operators import (
    AnalyzeOperator,
    ExtractOperator,
    GateOperator,
    MergeOperator,
    PlanOperator,
    PreflightOperator,
    ReportOperator,
    RunShardOperator,
    SampleOperator,
    TokenizeOperator,
)
from blendserve.airflow.retries import RETRY_POLICY
from blendserve.errors import UsageError
from blendserve.spec import JobSpec, describe_validation_error

DEFAULT_EXECUTION_TIMEOUT = timedelta(hours=12)
_SHARD_NAME = (
    "{% if task.shard['shard'] is none %}nothing left to run"
    "{% else %}shard {{ task.shard['shard'] }} · density {{ task.shard['density'] }}{% endif %}"
)


class BlendServePlan(TaskGroup):  # type: ignore[misc]
    """preflight → extract → tokenize → analyze → plan → report, without an engine: what a job would cost and share.

    :param group_id: name of the group in the DAG.
    :param use_params: the run's params (the trigger form) win over the options.
    :param storage_conn_id: connection of the type “BlendServe object store”, for jobs on one.
    :param retries: as for `BlendServeBatch`, like the two after it.
    :param options: fields of `JobSpec`.
    """

    def __init__(
        self,
        group_id: str = "blendserve_plan",
        *,
        use_params: bool = False,
        storage_conn_id: str | None = None,
        retries: int | None = None,
        retry_delay: timedelta | None = None,
        retry_policy: RetryPolicy | None = None,
        **options: Any,
    ) -> None:
        super().__init__(group_id=group_id)
        options, named = plain_options(options)
        self.default_args = _default_args(
            self,
            storage_conn_id=storage_conn_id or named,
            retries=retries,
            retry_delay=retry_delay,
            retry_policy=retry_policy,
        )
        with self:
            root, prepared = _prepare(options, use_params)
            plan = PlanOperator(task_id="plan", root=root, is_preview=True)
            prepared >> plan >> ReportOperator(task_id="report", root=root)


class BlendServeBatch(TaskGroup):  # type: ignore[misc]
    """A whole job: preflight → extract → tokenize → analyze → sample → plan → run_shard … → merge → report → gate.

    `run_shard` is mapped over the shards of the plan. It and `sample` run in the GPU pool, a slot each. merge and
    report run also when shards failed, so that what is finished can be used; gate doesn't, so the run fails. Clear
    the failed tasks, with or without those after them, and the job goes on.

    :param group_id: name of the group in the DAG.
    :param use_params: the run's params (the trigger form) win over the options.
    :param storage_conn_id: connection of the type “BlendServe object store”, for jobs on one.
    :param results_asset: gets an event with `rows`, `failed` and `path` when the job is done.
    :param pool: pool of the tasks that run the engine; by default `[blendserve] gpu_pool`.
    :param queue: queue of these tasks; by default `[blendserve] gpu_queue`, or else the executor's default queue.
    :param executor: executor of these tasks, where Airflow has several; by default the first one.
    :param executor_config: what that executor wants to know of these tasks, such as `{"pod_override": …}`.
    :param retries: attempts after the first one; each goes on where the last one stopped. By default what the DAG's
        `default_args` say, or else 2; so it is with the connection and the next two.
    :param retry_delay: time before the next attempt; by default `[blendserve] retry_delay_seconds`.
    :param retry_policy: which failures are tried again; by default `RETRY_POLICY`.
    :param execution_timeout: longest time for one shard.
    :param options: fields of `JobSpec`.
    """

    def __init__(
        self,
        group_id: str = "blendserve",
        *,
        use_params: bool = False,
        storage_conn_id: str | None = None,
        results_asset: Asset | None = None,
        pool: str | None = None,
        queue: str | None = None,
        executor: str | None = None,
        executor_config: dict[str, Any] | None = None,
        retries: int | None = None,
        retry_delay: timedelta | None = None,
        retry_policy: RetryPolicy | None = None,
        execution_timeout: timedelta = DEFAULT_EXECUTION_TIMEOUT,
        **options: Any,
    ) -> None:
        super().__init__(group_id=group_id)
        options, named = plain_options(options)
        self.default_args = _default_args(
            self,
            storage_conn_id=storage_conn_id or named,
            retries=retries,
            retry_delay=retry_delay,
            retry_policy=retry_policy,
        )
        on_gpu = {
            **_gpu_placement(pool, queue),
            "execution_timeout": execution_timeout,
            "executor": executor,
            "executor_config": executor_config,
        }
        with self:
            root, prepared = _prepare(options, use_params)
            sample = SampleOperator(task_id="sample", root=root, **on_gpu)
            plan = PlanOperator(task_id="plan", root=root)
            run_shard = RunShardOperator.partial(
                task_id="run_shard",
                root=root,
                map_index_template=_SHARD_NAME,
                **on_gpu,
            ).expand(shard=plan.output)
            merge = MergeOperator(task_id="merge", root=root, trigger_rule="all_done_min_one_success")
            report = ReportOperator(task_id="report", root=root)
            gate = GateOperator(task_id="gate", root=root, results_asset=results_asset)
            prepared >> sample >> plan >> run_shard >> merge >> report >> gate
            plan >> merge  # so that merge waits for a plan that worked, not for shards that worked
            run_shard >> gate  # so that clearing what failed makes gate wait for the shards that run again


def _prepare(options: dict[str, Any], use_params: bool) -> tuple[str, AnalyzeOperator]:
    """The steps before the first GPU task; returns the job's folder, known once preflight ran, and the last step."""
    _check_options(options, use_params)
    preflight = PreflightOperator(task_id="preflight", options=options, use_params=use_params)
    # A template rather than `preflight.output`, which would make preflight an upstream of every task and so count as
    # the one success that merge waits for.
    root = f"{{{{ ti.xcom_pull(task_ids='{preflight.task_id}')['root'] }}}}"
    extract = ExtractOperator(task_id="extract", options=options, use_params=use_params)
    tokenize = TokenizeOperator(task_id="tokenize", root=root)
    analyze = AnalyzeOperator(task_id="analyze", root=root)
    preflight >> extract >> tokenize >> analyze
    return root, analyze


def _check_options(options: dict[str, Any], use_params: bool) -> None:
    """Raises UsageError for what no run could take. Values that Airflow renders are known to a run only."""
    fields = JobSpec.model_fields
    if unknown := sorted(options.keys() - fields):
        raise UsageError(f"Unknown option(s) {', '.join(unknown)}. Known: {', '.join(sorted(fields))}.")
    required = {name: "-" for name, field in fields.items() if field.is_required()}
    if not use_params and (missing := sorted(required.keys() - options)):
        raise UsageError(f"Option(s) {', '.join(missing)} missing. State them, or use_params in a DAG with a form.")
    known = {name: value for name, value in options.items() if name == "template" or not _is_rendered(value)}
    try:
        JobSpec.model_validate(required | known)
    except ValidationError as error:
        raise UsageError(describe_validation_error(error)) from error


def _is_rendered(value: Any) -> bool:
    if isinstance(value, str):
        return "{{" in value or "{%" in value
    return not isinstance(value, (bool, int, float, type(None)))


def _default_args(group: TaskGroup, **stated: Any) -> dict[str, Any]:
    """What all tasks of the group get: what is stated, or else what the DAG and the groups around say, or else ours."""
    ours = {
        "storage_conn_id": None,
        "retries": 2,
        "retry_delay": timedelta(seconds=configuration.get_integer("retry_delay_seconds")),
        "retry_policy": RETRY_POLICY,
    }
    return {**ours, **group.dag.default_args, **group.default_args} | {
        name: value for name, value in stated.items() if value is not None
    }


def _gpu_placement(pool: str | None, queue: str | None) -> dict[str, Any]:
    """Pool and queue of the tasks that run the engine. Airflow renders neither, so they come from configuration."""
    placement = {"pool": pool or configuration.get("gpu_pool"), "queue": queue or configuration.get("gpu_queue")}
    return {name: value for name, value in placement.items() if value}
