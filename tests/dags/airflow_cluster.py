"""A real Airflow for tests: Postgres, Redis, API server, scheduler, DAG processor and Celery workers, on own ports.

Everything lies in a folder of its own and ends by process id. Postgres and Redis are Debian's programs
(`install_programs.sh`).
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

DAGS = Path(__file__).resolve().parents[2] / "dags"
START_SECONDS = 150.0
# Short ones, so that a test sees in seconds what takes minutes in a team's Airflow.
LEASE_SECONDS = 6
HEARTBEAT_TIMEOUT_SECONDS = 6
# A job that is tried again as often as its workers are lost, and a preview of whatever data arrives.
OWN_DAGS = """
from datetime import timedelta
from airflow.sdk import DAG, Asset
from blendserve.airflow import BlendServeBatch, BlendServePlan, form_params

with DAG("patient_batch", schedule=None, params=form_params()):
    BlendServeBatch(group_id="batch", use_params=True, retries=50, retry_delay=timedelta(0))

with DAG(
    "preview_on_arrival",
    schedule=[Asset("requests_landed")],
    params=form_params(input="requests.parquet", output="previews/{run_id}"),
):
    BlendServePlan(group_id="preview", use_params=True)
"""
PREPARE = "from blendserve.airflow.standalone import prepare; prepare()"


class AirflowCluster:
    """Airflow with one user, `ann`, a worker on the queue `cpu` and one on `gpu`, working in `workspace`."""

    def __init__(self, workspace: Path, environment: dict[str, str]) -> None:
        self.workspace = workspace
        self.home = workspace / "airflow"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._database = _Postgres()
        redis_port, self._port = _free_ports(2)
        self.address = f"http://127.0.0.1:{self._port}"
        self.client = httpx.Client(base_url=self.address, timeout=60)
        database = f"postgresql+psycopg2://airflow@127.0.0.1:{self._database.port}/postgres"
        self._environment = environment | _settings(self.home, self.address, database, redis_port)
        _make_plugins_folder(self.home)
        shutil.copytree(DAGS, self.home / "dags", ignore=shutil.ignore_patterns("__pycache__"))
        (self.home / "dags" / "own_dags.py").write_text(OWN_DAGS)
        self._start("redis", [_program("redis-server"), "--port", redis_port, "--save", "", "--bind", "127.0.0.1"])
        subprocess.run([sys.executable, "-c", PREPARE], env=self._environment, check=True, capture_output=True)
        self._airflow("api-server", "--port", self._port)
        self._airflow("scheduler")
        self._airflow("dag-processor")
        self.start_worker("cpu")
        self.start_worker("gpu")

    def start_worker(self, queue: str, name: str = "") -> None:
        """One more Celery worker; two of them on a host need log servers of their own."""
        (port,) = _free_ports(1)
        name = name or queue
        concurrency = 2 if queue == "cpu" else 1
        self._airflow(
            *("celery", "worker", "--queues", queue, "--concurrency", concurrency),
            *("--celery-hostname", f"{name}@%h", "--without-mingle", "--without-gossip"),
            name=name,
            AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT=str(port),
        )

    def signal_worker(self, name: str, number: signal.Signals) -> None:
        """To the worker and all that it started, as when its machine goes away or is suspended."""
        for process in self.processes_of(name):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        if number == signal.SIGKILL:
            self._processes.pop(name).wait()

    def processes_of(self, name: str) -> list[psutil.Process]:
        worker = psutil.Process(self._processes[name].pid)
        return [worker, *worker.children(recursive=True)]

    def sign_in(self) -> None:
        """Wait until the DAGs are there; then `client` is signed in as `ann`."""
        passwords = self.home / "simple_auth_manager_passwords.json.generated"
        self.wait_until(lambda: self._is_answering() and passwords.is_file(), START_SECONDS)
        self.password = json.loads(passwords.read_text())["ann"]
        login = {"username": "ann", "password": self.password}
        token = self.client.post("/auth/token", json=login).json()["access_token"]
        self.client.headers["Authorization"] = f"Bearer {token}"
        self.wait_until(
            lambda: self._has_dags("blendserve_batch", "patient_batch", "preview_on_arrival"), START_SECONDS
        )

    def trigger(self, dag_id: str = "blendserve_batch", **params: Any) -> httpx.Response:
        return self.client.post(f"/api/v2/dags/{dag_id}/dagRuns", json={"logical_date": None, "conf": params})

    def wait_until(self, is_so: Callable[[], bool], seconds: float, *, every_seconds: float = 0.3) -> None:
        deadline = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < deadline, self._last_lines()
            time.sleep(every_seconds)

    def wait_for_run(self, run_url: str, *states: str, seconds: float = 240.0) -> dict[str, Any]:
        """The run, once it is in one of `states`."""
        run: dict[str, Any] = {}

        def has_come() -> bool:
            run.update(self.client.get(run_url).json())
            return run["state"] in states

        self.wait_until(has_come, seconds, every_seconds=1.0)  # each question keeps the server busy
        return run

    def stop(self) -> None:
        """End everything that was started, by process id."""
        self.client.close()
        for name in list(self._processes):
            self.signal_worker(name, signal.SIGKILL)
        self._database.stop()

    def _has_dags(self, *dag_ids: str) -> bool:
        return all(self.client.get(f"/api/v2/dags/{dag_id}").is_success for dag_id in dag_ids)

    def _is_answering(self) -> bool:
        try:
            return self.client.get("/api/v2/version").is_success
        except httpx.HTTPError:
            return False

    def _airflow(self, *arguments: Any, name: str = "", **settings: str) -> None:
        self._start(name or arguments[0], [sys.executable, "-m", "airflow", *arguments], settings)

    def _start(self, name: str, command: list[Any], settings: dict[str, str] | None = None) -> None:
        with (self.workspace / f"{name}.log").open("w") as log:
            self._processes[name] = subprocess.Popen(
                list(map(str, command)),
                cwd=self.workspace,
                env=self._environment | (settings or {}),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _last_lines(self) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text()[-1500:]}" for path in self.workspace.glob("*.log"))


def missing_programs() -> list[str]:
    """The programs that the cluster needs and this machine lacks."""
    return [name for name in ("postgres", "initdb", "redis-server") if _program(name) is None]


class _Postgres:
    """A database server without durability, with the user `airflow`."""

    def __init__(self) -> None:
        (self.port,) = _free_ports(1)
        self._folder = Path(tempfile.mkdtemp(prefix="blendserve-postgres-"))
        # It refuses to run as root.
        account = pwd.getpwnam("postgres") if os.getuid() == 0 else None
        as_user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []} if account else {}
        if account:
            os.chown(self._folder, account.pw_uid, account.pw_gid)
        data = str(self._folder / "data")
        subprocess.run(
            [str(_program("initdb")), "--no-sync", "--auth=trust", "--username=airflow", "--encoding=UTF8", "-D", data],
            check=True,
            capture_output=True,
            cwd="/",
            **as_user,
        )
        with (self._folder / "log").open("w") as log:
            self._process = subprocess.Popen(
                [str(_program("postgres")), "-D", data, "-p", str(self.port), "-k", "", "-h", "127.0.0.1", "-F"],
                stdout=log,
                stderr=log,
                cwd="/",
                **as_user,
            )
        while self._process.poll() is None:
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise AssertionError((self._folder / "log").read_text())

    def stop(self) -> None:
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait(timeout=30)
        shutil.rmtree(self._folder)


def _settings(home: Path, address: str, database: str, redis_port: int) -> dict[str, str]:
    return {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(home / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "AIRFLOW__CORE__EXECUTOR": "CeleryExecutor",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": "ann:admin",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{address}/execution/",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": database,
        "AIRFLOW__OPERATORS__DEFAULT_QUEUE": "cpu",
        "AIRFLOW__CELERY__BROKER_URL": f"redis://127.0.0.1:{redis_port}/0",
        "AIRFLOW__CELERY__RESULT_BACKEND": "db+" + database.replace("+psycopg2", ""),
        "AIRFLOW__CELERY_BROKER_TRANSPORT_OPTIONS__VISIBILITY_TIMEOUT": "86400",
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__BASE_URL": address,
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__API__SECRET_KEY": "only for tests, where nobody else can reach it",
        "AIRFLOW__API_AUTH__JWT_SECRET": "only for tests, where nobody else can reach it, and long enough for HS512",
        "AIRFLOW__DAG_PROCESSOR__PARSING_PROCESSES": "1",
        "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "3600",  # no file changes
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": str(HEARTBEAT_TIMEOUT_SECONDS),
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "1",
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_SEC": "1",
        "AIRFLOW__WORKERS__MIN_HEARTBEAT_INTERVAL": "1",
        "AIRFLOW__BLENDSERVE__GPU_QUEUE": "gpu",
        "BLENDSERVE_LEASE_SECONDS": str(LEASE_SECONDS),
    }


def _make_plugins_folder(home: Path) -> None:
    """The plugin also where the package's entry points are those of an older installation."""
    (home / "plugins").mkdir(parents=True)
    (home / "plugins" / "blendserve_plugin.py").write_text(
        "from blendserve.airflow.plugin import BlendServePlugin\n", encoding="utf-8"
    )


def _program(name: str) -> str | None:
    """Debian keeps the server's programs of Postgres out of PATH."""
    places = [os.environ.get("PATH", ""), *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True))]
    return shutil.which(name, path=os.pathsep.join(places))


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports
