"""One run of one DAG in this process, without a server: `python -m blendserve.airflow.single_run DAG_ID PARAMS_JSON`.

`standalone run` starts it in a process of its own, with the environment set: Airflow keeps the signal handlers that
a task installs, so nothing in this process can be relied on to stop it.
"""

from __future__ import annotations

import json
import logging
import os
import sys

import structlog

from blendserve.airflow.standalone import prepare
from blendserve.errors import BlendServeError, UsageError

log = structlog.get_logger(__name__)


class RunFailedError(BlendServeError):
    """The run ended, but not in success."""


def run_dag(dag_id: str, params: str) -> None:
    """Run the DAG `dag_id` of the DAGs folder to its end, with `params`, a JSON object.

    Raises UsageError for an unknown DAG or bad params, RunFailedError when a task failed.
    """
    stated = _params(params)
    from airflow.dag_processing.dagbag import DagBag

    # It warns every second in which no task can start, which is every second of a retry's delay.
    logging.getLogger("airflow.sdk.definitions.dag").setLevel(logging.ERROR)
    prepare()
    folder = os.environ["AIRFLOW__CORE__DAGS_FOLDER"]
    bag = DagBag(folder)
    if dag_id not in bag.dags:
        raise UsageError(
            f"{folder} has no DAG '{dag_id}'. It has: {', '.join(sorted(bag.dags)) or 'none'}."
            + "".join(f"\n{file} can't be imported: {error}" for file, error in bag.import_errors.items())
        )
    state = bag.dags[dag_id].test(run_conf=stated).state
    if state != "success":
        raise RunFailedError(f"The run of {dag_id} ended as '{state}'. The lines above say which task failed and why.")


def _params(text: str) -> dict[str, object]:
    try:
        stated = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--conf is not JSON: {error}; got {text!r}.") from error
    if not isinstance(stated, dict):
        raise UsageError(f"--conf holds {type(stated).__name__}, expected an object of params; got {text!r}.")
    return stated


def main() -> None:
    status = 0
    try:
        run_dag(*sys.argv[1:])
    except BlendServeError as error:
        log.error(str(error))
        status = error.exit_status
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # everything is on disk; taking Airflow and torch apart object by object takes seconds


if __name__ == "__main__":
    main()
