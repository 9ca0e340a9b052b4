"""What BlendServe's operators have in common: which failures are retried, credentials, options, the job's folder.

Nothing heavy is imported at module level, because Airflow parses DAG files every few seconds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

from airflow.sdk import BaseOperator, Context, ObjectStoragePath
from airflow.sdk.log import mask_secret

from blendserve.airflow import configuration, library
from blendserve.airflow.job_options import job_spec, secrets_in
from blendserve.airflow.retries import RETRY_POLICY
from blendserve.airflow.storage import use_connection
from blendserve.spec import JobSpec

PROGRESS_KEY = "blendserve_progress"


class BlendServeOperator(BaseOperator):  # type: ignore[misc]
    """Base of all steps. Its retry policy ends a task at once on an error that another attempt can't mend.

    :param storage_conn_id: connection of the type “BlendServe object store”, for jobs on one.
    """

    ui_color = "#e8f1fb"
    template_fields: Sequence[str] = ("storage_conn_id",)
    template_ext: Sequence[str] = (".sql",)

    def __init__(self, *, storage_conn_id: str | None = None, **kwargs: Any) -> None:
        if kwargs.get("retry_policy") is None:  # which is what a mapped task states where nobody does
            kwargs["retry_policy"] = RETRY_POLICY
        super().__init__(**kwargs)
        self.storage_conn_id = storage_conn_id

    def execute(self, context: Context) -> Any:
        use_connection(self.storage_conn_id)
        return self.run_step(context)

    def run_step(self, context: Context) -> Any:
        raise NotImplementedError

    def logged(self, found: dict[str, Any]) -> dict[str, Any]:
        """Log what the step found, and return it."""
        self.log.info(f"{self.task_id} done", **found)
        return found


class JobOptionsOperator(BlendServeOperator):
    """Base of the two steps that start from what the user asked for.

    :param options: fields of `JobSpec` by name; strings are Airflow templates (`{{ ds }}`), except `template`. `sql`
        may name a `.sql` file beside the DAG. `input` and `output` may be an `ObjectStoragePath`, whose connection is
        used unless `storage_conn_id` says otherwise.
    :param use_params: the run's params (the trigger form) win over `options`.
    """

    template_fields: Sequence[str] = ("options", *BlendServeOperator.template_fields)
    template_fields_renderers: ClassVar[dict[str, str]] = {"options": "json", "options.sql": "sql"}

    def __init__(self, *, options: Mapping[str, Any] | None = None, use_params: bool = False, **kwargs: Any) -> None:
        stated, conn_id = plain_options(options or {})
        if conn_id is not None:
            kwargs.setdefault("storage_conn_id", conn_id)
        super().__init__(**kwargs)
        self.prompt_template = stated.pop("template", None)
        self.options = stated
        self.use_params = use_params
        # Now, as a run writes its own values into these very params.
        self._proposed = {name: self.params.get_param(name).value for name in self.params}

    def render_template_fields(self, context: Context, jinja_env: Any = None) -> None:
        """As usual; passwords in URLs are hidden from then on, in the rendered fields and in logs."""
        super().render_template_fields(context, jinja_env)
        for secret in secrets_in(self.options):
            mask_secret(secret)

    def job_spec(self, context: Context) -> JobSpec:
        options = dict(self.options)
        if self.prompt_template is not None:
            options["template"] = self.prompt_template
        form = self._form(context) if self.use_params else {}
        return job_spec(options, form, context["run_id"], proposed=self._proposed)

    def _form(self, context: Context) -> dict[str, Any]:
        """The run's params without those that the DAG declares for tasks of its own; a mistyped one is still there."""
        own = set(self.params) - set(JobSpec.model_fields) - set(library.FIELDS)
        return {name: value for name, value in context["params"].items() if name not in own}


class FolderOperator(BlendServeOperator):
    """Base of the steps that need nothing but the job's folder.

    :param root: the job's output folder, or its URL on an object store.
    """

    template_fields: Sequence[str] = ("root", *BlendServeOperator.template_fields)
    # Which of the folder's files the step reads, when they have to be fetched: patterns, `*` matches `/` too.
    reads: ClassVar[tuple[str, ...]] = ("*",)
    # Whether other steps and runs are kept out of the folder meanwhile, whose files would else get among this one's.
    is_alone: ClassVar[bool] = True

    def __init__(self, *, root: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = root

    def run_step(self, context: Context) -> Any:
        from blendserve.working_copy import working_copy

        with held(self.root) if self.is_alone else nullcontext(), working_copy(self.root, self.reads) as root:
            return self.run_in(root, context)

    def run_in(self, root: Path, context: Context) -> Any:
        raise NotImplementedError


def held(place: str) -> AbstractContextManager[Any]:
    """Keep other steps and other runs out of the job's folder at `place`; one that is being stopped is waited for.

    Raises InUseError when another one goes on.
    """
    from blendserve.engine.shard_folder import STOP_SECONDS
    from blendserve.job_record import holding

    return holding(place, wait_seconds=STOP_SECONDS)


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
    """Base of the steps that run the engine: it stops within seconds when the task is killed or takes too long."""

    _must_stop = False

    def on_kill(self) -> None:
        self._must_stop = True

    def should_stop(self) -> bool:
        return self._must_stop


def plain_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """`options` with paths as text, and the connection that one of them names."""
    plain: dict[str, Any] = {}
    conn_id: str | None = None
    for name, value in options.items():
        if isinstance(value, ObjectStoragePath):
            conn_id = conn_id or value.conn_id
            plain[name] = f"{value.protocol}://{value.path}"
        else:
            plain[name] = str(value) if isinstance(value, Path) else value
    return plain, conn_id
