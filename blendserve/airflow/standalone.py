"""Airflow on this machine alone, ready for BlendServe: its own home folder, the GPU pool, the project's DAGs.

    python -m blendserve.airflow.standalone                              the UI on localhost, until Ctrl-C
    python -m blendserve.airflow.standalone run blendserve_batch --conf '{"limit": 10}'    one run, without a server

The home folder is $BLENDSERVE_AIRFLOW_HOME, or `.airflow` in the working directory. Every setting made here is a
default: an `AIRFLOW__…` variable that is set already wins. Without login and with SQLite, this is for trying things
out; `docker/` holds what a team runs.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import httpx
import typer

from blendserve.errors import BlendServeError, UsageError

START_SECONDS = 120.0
STOP_SECONDS = 8.0
# What a person who runs a DAG in a terminal wants to read; Airflow's own lines drown it.
SHOWN_LOGS = "blendserve=INFO airflow.task.operators.blendserve=INFO airflow.sdk.definitions.dag=ERROR"

app = typer.Typer(add_completion=False, help="Airflow on this machine alone, ready for BlendServe.")


class AirflowStartError(BlendServeError):
    """Airflow ended, or was not healthy in time."""


def environment(home: Path, dags_folder: Path, port: int) -> dict[str, str]:
    """Settings of a light Airflow for one person, by environment variable; what is set already wins."""
    address = f"http://127.0.0.1:{port}"
    defaults = {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(dags_folder),
        # Writers wait for each other: on a busy machine longer than the five seconds that are sqlite3's default.
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db?timeout=60",
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__PARALLELISM": "4",
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{address}/execution/",
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__BASE_URL": address,
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "10",
        "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "10",
        "AIRFLOW__DAG_PROCESSOR__PARSING_PROCESSES": "1",
        "AIRFLOW__BLENDSERVE__DATA_FOLDER": str(Path.cwd()),
    }
    # Airflow starts its parts as `airflow …`: the one beside this interpreter, also when the environment isn't active.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    return {**defaults, **os.environ, "PATH": path}


def prepare() -> None:
    """Create or upgrade Airflow's database and make the GPU pool. Reads the settings from the environment."""
    from airflow.utils import db

    from blendserve.airflow.gpu_pool import ensure_gpu_pool

    db.initdb()
    ensure_gpu_pool()


@app.callback(invoke_without_command=True)
def serve(
    context: typer.Context,
    dags: Annotated[Path, typer.Option(help="Folder of the DAG files.")] = Path("dags"),
    port: Annotated[int, typer.Option(help="Port of the UI on localhost.")] = 8080,
) -> None:
    """Start the UI and everything behind it; stop it all with Ctrl-C."""
    home = Path(os.environ.get("BLENDSERVE_AIRFLOW_HOME", ".airflow")).absolute()
    os.environ.update(environment(home, dags.absolute(), port))
    if context.invoked_subcommand is not None:
        return
    _check_port(port)
    prepare()
    address = f"http://127.0.0.1:{port}"
    with _own_session([sys.executable, "-m", "airflow", "standalone"]) as process:
        _wait_until_healthy(process, address)
        typer.echo(f"\nAirflow is ready: {address}\nTrigger the DAG at {address}/dags/blendserve_batch\n")
        raise typer.Exit(process.wait())


@app.command()
def run(
    dag_id: Annotated[str, typer.Argument(help="Which DAG.")],
    conf: Annotated[str, typer.Option(help="Params of the run, as JSON.")] = "{}",
) -> None:
    """Run a DAG once, to its end, without a server; the exit status says how it went."""
    os.environ.setdefault("AIRFLOW__LOGGING__LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("AIRFLOW__LOGGING__NAMESPACE_LEVELS", SHOWN_LOGS)
    os.environ.setdefault("AIRFLOW__BLENDSERVE__RETRY_DELAY_SECONDS", "1")
    with _own_session([sys.executable, "-m", "blendserve.airflow.single_run", dag_id, conf]) as process:
        raise typer.Exit(process.wait())


@contextmanager
def _own_session(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run `command` as the leader of a session; when this ends or is stopped, all of the session ends with it."""
    process = subprocess.Popen(command, start_new_session=True)  # noqa: S603 - this interpreter, no shell

    def stop(signal_number: int, _frame: FrameType | None) -> None:
        raise typer.Exit(128 + signal_number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        yield process
    finally:
        _stop_session(process)


def _check_port(port: int) -> None:
    """Another Airflow there would answer for this one. Raises UsageError."""
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:
        raise UsageError(
            f"Port {port} of localhost can't be used: {error}. Stop what listens there, perhaps another Airflow, or "
            "choose another with --port (make airflow PORT=…)."
        ) from error


def _wait_until_healthy(process: subprocess.Popen[bytes], address: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if is_healthy(address):
            return
        time.sleep(0.5)
    raise AirflowStartError(
        f"Airflow did not get healthy at {address} within {START_SECONDS:.0f} s; its own lines above say why."
    )


def is_healthy(address: str) -> bool:
    """Whether the API server, the scheduler and the DAG processor all answer."""
    try:
        state = httpx.get(f"{address}/api/v2/monitor/health", timeout=5).json()
    except (httpx.HTTPError, ValueError):
        return False
    return all(state[part]["status"] == "healthy" for part in ("metadatabase", "scheduler", "dag_processor"))


def _stop_session(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=STOP_SECONDS)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


if __name__ == "__main__":
    try:
        app()
    except BlendServeError as error:
        typer.echo(str(error), err=True)
        sys.exit(error.exit_status)
