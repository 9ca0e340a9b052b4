"""A real Airflow for tests: API server, scheduler, DAG processor and triggerer with SQLite, on ports of its own."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from blendserve.airflow.standalone import is_healthy

DAGS = Path(__file__).resolve().parents[2] / "dags"
START_SECONDS = 150.0


class AirflowServer:
    """Airflow with one user, `ann`, working in the folder `workspace`; its home is `workspace/airflow`."""

    def __init__(self, workspace: Path, environment: dict[str, str]) -> None:
        self.workspace = workspace
        self._log = workspace / "server.log"
        port, *others = _free_ports(3)
        self.address = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.address, timeout=60)
        settings = {
            "BLENDSERVE_AIRFLOW_HOME": str(workspace / "airflow"),
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "False",
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": "ann:admin",
            "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": str(others[0]),
            "AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT": str(others[1]),
        }
        plugins = workspace / "airflow" / "plugins"
        plugins.mkdir()
        (plugins / "blendserve_plugin.py").write_text("from blendserve.airflow.plugin import BlendServePlugin\n")
        command = [sys.executable, "-m", "blendserve.airflow.standalone", "--dags", str(DAGS), "--port", str(port)]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, cwd=workspace, env=environment | settings, stdout=log, stderr=subprocess.STDOUT
            )

    def sign_in(self) -> None:
        """Wait until all parts are healthy and the DAGs are there; then `client` is signed in as `ann`."""
        passwords = self.workspace / "airflow" / "simple_auth_manager_passwords.json.generated"
        self.wait_until(lambda: is_healthy(self.address) and passwords.is_file(), START_SECONDS)
        self.password = json.loads(passwords.read_text())["ann"]
        login = {"username": "ann", "password": self.password}
        token = self.client.post("/auth/token", json=login).json()["access_token"]
        self.client.headers["Authorization"] = f"Bearer {token}"
        self.wait_until(lambda: self.client.get("/api/v2/dags/blendserve_batch").status_code == 200, START_SECONDS)

    def trigger(self, **params: Any) -> httpx.Response:
        body = {"logical_date": None, "conf": params}
        return self.client.post("/api/v2/dags/blendserve_batch/dagRuns", json=body)

    def wait_until(self, is_so: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < deadline, self._log.read_text()[-4000:]
            time.sleep(0.5)

    def stop(self) -> None:
        """End everything that was started."""
        self.client.close()
        self._process.send_signal(signal.SIGINT)
        self._process.wait(timeout=30)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports
