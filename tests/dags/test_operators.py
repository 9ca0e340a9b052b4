"""Single operators: which errors end a task for good, how a killed shard stops, when the gate lets a run pass."""

from __future__ import annotations

import pickle
import shutil
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from airflow.sdk import DAG, Param, RetryAction, TaskGroup
from airflow.sdk._shared.secrets_masker import redact
from airflow.sdk.definitions.param import process_params
from airflow.sdk.exceptions import AirflowFailException

from blendserve import job
from blendserve.airflow.base import BlendServeOperator
from blendserve.airflow.form import form_params
from blendserve.airflow.job_options import job_spec
from blendserve.airflow.operators import (
    ExtractOperator,
    GateOperator,
    PlannedShard,
    PlanOperator,
    PreflightOperator,
    RunShardOperator,
    SampleOperator,
    TokenizeOperator,
)
from blendserve.airflow.task_group import BlendServeBatch, BlendServePlan
from blendserve.errors import (
    BlendServeError,
    EngineOutOfMemoryError,
    EngineProcessError,
    Interrupted,
    InUseError,
    ModelError,
    ReconciliationError,
    StoreUnreachableError,
    UsageError,
)
from blendserve.job_record import holding
from blendserve.spec import JobSpec


class StateStore(dict[str, Any]):
    """The part of Airflow's task state store that the operators use."""

    def set(self, key: str, value: Any) -> None:
        self[key] = value


@pytest.fixture
def context(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("AIRFLOW__BLENDSERVE__DATA_FOLDER", str(workspace))
    pushed: dict[str, Any] = {}
    return {
        "ti": SimpleNamespace(xcom_push=pushed.__setitem__),
        "params": {"input": "requests.parquet", "output": "out/{run_id}"},
        "run_id": "run-1",
        "task_state_store": StateStore(),
        "pushed": pushed,
    }


def test_preflight_returns_the_folder_and_leaves_a_mark_for_the_report_tab(
    context: dict[str, Any], workspace: Path, tiny_model: Path
) -> None:
    operator = PreflightOperator(task_id="preflight", options={"model": str(tiny_model)}, use_params=True)
    assert operator.run_step(context) == {"root": f"{workspace}/out/run-1"}
    assert context["pushed"] == {"blendserve_output": f"{workspace}/out/run-1"}


def test_params_that_a_dag_declares_for_itself_are_no_options_of_the_job(context: dict[str, Any]) -> None:
    with DAG("own", schedule=None, params={"team": "reviews"}):
        operator = PreflightOperator(task_id="preflight", use_params=True)
    context["params"]["team"] = "articles"
    assert operator.job_spec(context).input.endswith("requests.parquet")
    context["params"]["max_token"] = 3
    with pytest.raises(UsageError, match="Unknown option 'max_token'"):
        operator.job_spec(context)


def test_paths_that_the_author_of_a_dag_proposes_may_lie_anywhere(context: dict[str, Any]) -> None:
    proposed = {"input": "/elsewhere/in.parquet", "output": "/elsewhere/{run_id}"}
    params = {**form_params(**proposed), "required": Param(type="string")}
    with DAG("own", schedule=None, params=params) as dag:
        operator = PreflightOperator(task_id="preflight", use_params=True)

    def spec_of(conf: dict[str, Any]) -> JobSpec:
        params = process_params(dag, operator, {"required": "x"} | conf, suppress_exception=False)
        return operator.job_spec(context | {"params": params})

    assert spec_of({"max_tokens": 3}).output == "/elsewhere/run-1"
    for name in proposed:
        with pytest.raises(UsageError, match=f"Option '{name}': '/elsewhere/other' lies outside"):
            spec_of(proposed | {name: "/elsewhere/other"})


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ({"input": "nothing.parquet"}, "nothing.parquet"),
        ({"input": "/etc/passwd"}, "Option 'input'.*allowed_paths"),
        ({"max_tokens": 0}, "Option 'max_tokens'"),
        ({"select": "select * from requests"}, "Unknown option 'select'"),
        ({"shards": 5000}, "Option 'shards': 5000 is more than Airflow maps a task over, 1024"),
        ({"model": "no/such/model"}, "Model 'no/such/model'"),
        ({"hardware": "h1000"}, "Unknown hardware 'h1000'"),
        ({"hardware": "none.json"}, "Profile .*none.json can't be read"),
        ({"template": "{{ nothing }}"}, "nothing"),
        ({"template": "{{ ''.__class__.__mro__ }}"}, "names no column"),
        ({"template": "{% include '/etc/passwd' %}{{ prompt }}"}, "a template stands alone"),
        ({"sql": "select * from read_csv('/etc/passwd')"}, "Option 'sql': the trigger form may not"),
        ({"sql_file": "../../etc/passwd"}, "Option 'sql_file': .* is not in the library"),
        ({"dataset": "../../etc/passwd"}, "Option 'dataset': .* is not in the library"),
        ({"input": "s3://me:hunter2@bucket/x.parquet"}, "Option 'input' holds a password"),
    ],
)
def test_what_only_the_user_can_mend_ends_the_task_for_good(
    context: dict[str, Any],
    workspace: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: dict[str, Any],
    reason: str,
) -> None:
    context["params"] |= {"model": str(tiny_model)} | form
    monkeypatch.setenv("AIRFLOW__BLENDSERVE__ALLOWED_PATHS", f"{workspace},{tiny_model}")
    operator = PreflightOperator(task_id="preflight", use_params=True)
    with pytest.raises(BlendServeError, match=reason) as caught:
        operator.execute(context)
    assert operator.retry_policy.evaluate(caught.value, 1, 3).action is RetryAction.FAIL


def test_plan_of_more_shards_than_airflow_maps_says_what_to_do(
    context: dict[str, Any], workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW__CORE__MAX_MAP_LENGTH", "2")
    shard = SimpleNamespace(shard=0, compute_seconds=1.0, memory_seconds=2.0, num_requests=3, predicted_seconds=4.0)
    monkeypatch.setattr(job, "plan", lambda _root, is_preview: SimpleNamespace(shards=[shard] * 3, summary={}))
    root = str(workspace / "job")
    with pytest.raises(UsageError, match=r"The plan has 3 shards.* than Airflow maps a task over, 2\..*shards=2"):
        PlanOperator(task_id="plan", root=root).execute(context)
    assert len(PlanOperator(task_id="plan", root=root, is_preview=True).execute(context)) == 3


def test_sql_of_the_form_runs_without_access_to_files(
    context: dict[str, Any], workspace: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context["params"] |= {"model": str(tiny_model), "sql": "select * from read_csv('/etc/passwd')"}
    monkeypatch.setenv("AIRFLOW__BLENDSERVE__ALLOWED_PATHS", f"{workspace},{tiny_model}")
    monkeypatch.setenv("AIRFLOW__BLENDSERVE__ALLOW_FREE_SQL", "True")
    with pytest.raises(UsageError, match=r"Option 'sql': .* disabled by configuration"):
        PreflightOperator(task_id="preflight", use_params=True).execute(context)


def test_model_folder_with_pickled_weights_is_refused(
    context: dict[str, Any], workspace: Path, tiny_model: Path
) -> None:
    shutil.copytree(tiny_model, workspace / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (workspace / "model" / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    context["params"]["model"] = "model"
    with pytest.raises(ModelError, match=r"only pytorch_model\.bin, which are pickles"):
        PreflightOperator(task_id="preflight", use_params=True).execute(context)


@pytest.mark.parametrize(
    "template",
    [
        "{{ prompt.__class__.__mro__ }}",
        "{{ prompt.format.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }} {{ prompt }}",
    ],
)
def test_template_that_breaks_out_of_its_sandbox_fails_each_row(
    context: dict[str, Any], workspace: Path, tiny_model: Path, template: str
) -> None:
    context["params"] |= {"model": str(tiny_model), "template": template, "input": f"{workspace}/requests.parquet"}
    spec = job_spec({}, context["params"] | {"model": "smollm2"}, "run")
    job.extract(spec.model_copy(update={"model": str(tiny_model)}))
    errors = pq.read_table(workspace / "out/run/work/requests.parquet")["error"].to_pylist()
    assert all(error and "the template fails on this row" in error for error in errors)


def test_passwords_in_urls_are_hidden_in_rendered_fields(context: dict[str, Any]) -> None:
    options = {"input": "s3://{{ params.user }}:hunter2@bucket/x", "output": "s3://bucket/out?token=hunter3"}
    operator = PreflightOperator(task_id="preflight", options=options)
    operator.render_template_fields(context | {"params": {"user": "me"}})
    assert operator.options["input"] == "s3://me:hunter2@bucket/x"
    shown = str(redact(operator.options))
    assert "s3://me:***@bucket/x" in shown and "hunter" not in shown


@pytest.mark.parametrize(
    ("error", "action"),
    [
        (EngineOutOfMemoryError("CUDA out of memory"), RetryAction.RETRY),
        (InUseError("in use"), RetryAction.RETRY),
        (StoreUnreachableError("s3://bucket doesn't answer"), RetryAction.RETRY),
        (EngineProcessError("a bug"), RetryAction.DEFAULT),
        (Interrupted("stopped"), RetryAction.DEFAULT),
        (ModelError("no such model"), RetryAction.FAIL),
    ],
)
def test_which_failures_are_tried_again(error: BlendServeError, action: RetryAction) -> None:
    for operator in (SampleOperator(task_id="sample", root="/job"), PlanOperator(task_id="plan", root="/job")):
        decision = operator.retry_policy.evaluate(error, 1, 3)
        assert decision.action is action
        assert (
            type(operator.retry_policy).deserialize(operator.retry_policy.serialize()).evaluate(error, 1, 3) == decision
        )


def test_killed_shard_asks_the_engine_to_stop(context: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    shard: PlannedShard = {"shard": 2, "density": 1.0, "num_requests": 5, "predicted_seconds": 1.0}
    operator = RunShardOperator(task_id="run_shard", root="/job", shard=shard)

    def run_shard(plan_folder: Path, number: int, *, on_progress: Any, should_stop: Any, completions: Any) -> None:
        assert completions is None, "those of the plan"
        assert (plan_folder, number) == (Path("/job/plan"), 2)
        on_progress({"event": "progress", "shard": 2, "done": 1, "total": 5})
        on_progress({"event": "progress", "shard": 2, "done": 2, "total": 5})
        assert not should_stop()
        operator.on_kill()
        assert should_stop()
        raise Interrupted("Shard 2 was stopped.")

    monkeypatch.setattr(job, "run_shard", run_shard)
    with pytest.raises(Interrupted):
        operator.execute(context)
    assert context["task_state_store"] == {"blendserve_progress": {"shard": 2, "done": 1, "total": 5}}, (
        "at most every 5 seconds"
    )


def test_only_tasks_that_run_the_engine_get_the_executors_pod() -> None:
    pod = {"pod_override": "a pod with a GPU"}
    with DAG("own", schedule=None) as dag:
        BlendServeBatch(input="/in", output="/out", executor="KubernetesExecutor", executor_config=pod)
    assert [
        task_id
        for task_id, task in dag.task_dict.items()
        if (task.executor, task.executor_config) == ("KubernetesExecutor", pod)
    ] == ["blendserve.sample", "blendserve.run_shard"]
    assert dag.get_task("blendserve.plan").executor is None


@pytest.mark.parametrize("group", [BlendServeBatch, BlendServePlan])
@pytest.mark.parametrize(
    ("default_args", "stated", "retries", "conn_id"),
    [
        ({}, {}, 2, None),
        ({"retries": 7, "storage_conn_id": "store"}, {}, 7, "store"),
        ({"retries": 7, "storage_conn_id": "store"}, {"retries": 0, "storage_conn_id": "own"}, 0, "own"),
    ],
)
def test_every_task_is_tried_again_as_stated_or_else_as_the_dag_says(
    group: type[TaskGroup], default_args: dict[str, Any], stated: dict[str, Any], retries: int, conn_id: str | None
) -> None:
    with DAG("own", schedule=None, default_args=default_args) as dag:
        group(input="/in", output="/out", **stated)
    tasks = [task.unmap({"shard": None}) if task.is_mapped else task for task in dag.tasks]
    assert {task.retries for task in tasks} == {retries}
    assert {task.retry_delay for task in tasks} == {timedelta(seconds=30)}
    assert {task.storage_conn_id for task in tasks} == {conn_id}


def test_nothing_left_to_run_is_a_success(context: dict[str, Any]) -> None:
    shard: PlannedShard = {"shard": None, "density": 0.0, "num_requests": 0, "predicted_seconds": 0.0}
    assert RunShardOperator(task_id="run_shard", root="/job", shard=shard).execute(context) == {"num_requests": 0}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_tokens": 0}, "Option 'max_tokens': .* greater than or equal to 1; got 0"),
        ({"policy": "blnd"}, "Option 'policy': .*; got 'blnd'"),
        ({"template": "{{ a }}", "prompt_column": "a"}, "template and prompt_column exclude each other"),
        ({"output": None}, "Option 'output': Input should be a valid string"),
    ],
)
def test_value_that_no_run_could_take_is_an_import_error(options: dict[str, Any], reason: str) -> None:
    for group in (BlendServeBatch, BlendServePlan):
        with DAG("own", schedule=None), pytest.raises(UsageError, match=reason):
            group(**{"input": "/in", "output": "/out", **options})


def test_job_without_input_is_an_import_error_unless_a_form_may_state_it() -> None:
    with DAG("own", schedule=None), pytest.raises(UsageError, match=r"Option\(s\) input missing"):
        BlendServeBatch(output="/out")
    with DAG("own", schedule=None, params={"input": "/in"}):
        BlendServeBatch(output="/out", use_params=True)


def test_values_that_a_run_renders_are_left_to_it() -> None:
    with DAG("own", schedule=None, params={"n": 3}) as dag:
        BlendServeBatch(input=dag.param("n"), output="/{{ ds }}", max_tokens="{{ params.n }}", stop=["{{ ds }}"])
    options = dag.get_task("blendserve.preflight").options
    assert (options["max_tokens"], options["stop"]) == ("{{ params.n }}", ["{{ ds }}"])


@pytest.mark.parametrize(("shard", "name"), [(3, "shard 3 · density 0.9"), (None, "nothing left to run")])
def test_names_of_mapped_tasks(shard: int | None, name: str) -> None:
    with DAG("own", schedule=None) as dag:
        BlendServeBatch(input="/in", output="/out")
    template = dag.get_task("blendserve.run_shard").partial_kwargs["map_index_template"]
    task = SimpleNamespace(shard={"shard": shard, "density": 0.9})
    assert dag.get_template_env().from_string(template).render(task=task) == name


@pytest.mark.parametrize(
    ("failed", "rejected", "policy", "passes"),
    [(0, 0, "fail", True), (1, 0, "continue", True), (1, 0, "fail", False), (0, 2, "fail", False)],
)
def test_gate_fails_the_run_when_rows_failed_and_the_job_asks_for_it(
    context: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    failed: int,
    rejected: int,
    policy: str,
    passes: bool,
) -> None:
    counts = {"input_rows": 9, "failed": failed, "rejected": rejected}
    monkeypatch.setattr(job, "finish", lambda _root: {"counts": counts, "spec": {"on_row_error": policy}})
    gate = GateOperator(task_id="gate", root="/job")
    if passes:
        assert gate.execute(context) == counts
        return
    with pytest.raises(AirflowFailException, match=f"{failed + rejected} of 9 rows"):
        gate.execute(context)


def test_gate_merges_again_when_shards_finished_after_the_merge(
    context: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[str] = []

    def finish(_root: Path) -> dict[str, Any]:
        calls.append("finish")
        if "merge" not in calls:
            raise ReconciliationError("3 request(s) of /job have no completion")
        return {"counts": {"input_rows": 3, "failed": 0, "rejected": 0}, "spec": {"on_row_error": "fail"}}

    monkeypatch.setattr(job, "finish", finish)
    monkeypatch.setattr(job, "merge", lambda _root, _lease: calls.append("merge"))
    monkeypatch.setattr(job, "report", lambda _root: calls.append("report"))
    GateOperator(task_id="gate", root=f"{tmp_path}/job").execute(context)
    assert calls == ["finish", "merge", "report", "finish"]


def test_gate_fails_when_rows_are_missing(
    context: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(_root: Path, _lease: Any = None) -> None:
        raise ReconciliationError("3 request(s) of /job have no completion")

    monkeypatch.setattr(job, "finish", fail)
    monkeypatch.setattr(job, "merge", fail)
    with pytest.raises(ReconciliationError):
        GateOperator(task_id="gate", root=f"{tmp_path}/job").execute(context)


def test_cleared_extract_of_a_run_that_starts_over_keeps_what_the_run_did(
    context: dict[str, Any], workspace: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW__BLENDSERVE__ALLOWED_PATHS", f"{workspace},{tiny_model}")
    context["params"] = {"model": str(tiny_model), "input": "requests.parquet", "output": "out", "force": True}
    with DAG("batch", schedule=None):
        extract = ExtractOperator(task_id="extract", use_params=True)
    extract.execute(context)
    completions = workspace / "out" / "completions"
    completions.mkdir()
    extract.execute(context)
    assert completions.is_dir()
    extract.execute(context | {"run_id": "run-2"})
    assert not completions.exists()


@pytest.mark.parametrize("step", ["extract", "tokenize"])
def test_a_step_keeps_out_of_a_folder_that_another_run_has_in_hand(
    context: dict[str, Any], workspace: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Two runs with one output: a step of the one would else leave its files among those of the other."""
    monkeypatch.setattr("blendserve.engine.shard_folder.STOP_SECONDS", 0.0)
    monkeypatch.setenv("AIRFLOW__BLENDSERVE__ALLOWED_PATHS", f"{workspace},{tiny_model}")
    context["params"]["model"] = str(tiny_model)
    root = f"{workspace}/out/run-1"
    steps: dict[str, BlendServeOperator] = {
        "extract": ExtractOperator(task_id="extract", use_params=True),
        "tokenize": TokenizeOperator(task_id="tokenize", root=root),
    }
    with holding(root), pytest.raises(InUseError, match=f"Output folder {root} is in use"):
        steps[step].execute(context)
