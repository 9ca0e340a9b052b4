"""A real Airflow (API server, scheduler, DAG processor, SQLite), asked over its REST API as other programs would."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blendserve.airflow.standalone import is_healthy

DAGS = Path(__file__).resolve().parents[2] / "dags"
START_SECONDS = 150.0


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("server")
    rows = {"request_id": ["one", "two", "three"], "prompt": ["first", "second", None]}
    pq.write_table(pa.table(rows), folder / "requests.parquet")
    return folder


@pytest.fixture(scope="module")
def address(workspace: Path, tiny_model: Path, migrated_home: Path, own_environment: dict[str, str]) -> Iterator[str]:
    """Where an Airflow of these tests' own listens. Everything it started ends with it."""
    shutil.copytree(migrated_home, workspace / "airflow")
    plugins = workspace / "airflow" / "plugins"
    plugins.mkdir()
    (plugins / "blendserve_plugin.py").write_text("from blendserve.airflow.plugin import BlendServePlugin\n")
    port, *others = free_ports(3)
    environment = own_environment | {
        "BLENDSERVE_AIRFLOW_HOME": str(workspace / "airflow"),
        "AIRFLOW__BLENDSERVE__ALLOWED_PATHS": f"{workspace},{tiny_model}",
        "AIRFLOW__BLENDSERVE__DEFAULT_MODEL": str(tiny_model),
        "AIRFLOW__BLENDSERVE__RETRY_DELAY_SECONDS": "1",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "False",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": "ann:admin",
        "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": str(others[0]),
        "AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT": str(others[1]),
    }
    command = [sys.executable, "-m", "blendserve.airflow.standalone", "--dags", str(DAGS), "--port", str(port)]
    with (workspace / "server.log").open("w") as log:
        process = subprocess.Popen(command, cwd=workspace, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: is_healthy(f"http://127.0.0.1:{port}"), START_SECONDS, workspace / "server.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def client(address: str, workspace: Path) -> Iterator[httpx.Client]:
    """A client that is signed in, once the DAGs are there."""
    password_file = workspace / "airflow" / "simple_auth_manager_passwords.json.generated"
    wait_until(password_file.is_file, 30, workspace / "server.log")
    password = httpx.Response(200, content=password_file.read_bytes()).json()["ann"]
    token = httpx.post(f"{address}/auth/token", json={"username": "ann", "password": password}).json()["access_token"]
    with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {token}"}, timeout=60) as client:
        dag = "/api/v2/dags/blendserve_batch"
        wait_until(lambda: client.get(dag).status_code == 200, START_SECONDS, workspace / "server.log")
        yield client


@pytest.fixture(scope="module")
def finished_run(client: httpx.Client, workspace: Path) -> dict[str, Any]:
    """A run of the batch DAG over three rows, one of them without a prompt."""
    answer = trigger(client, input="requests.parquet", output="out/{run_id}", max_tokens=3, ignore_eos=True)
    assert answer.status_code == 200, answer.text
    run_url = f"/api/v2/dags/blendserve_batch/dagRuns/{answer.json()['dag_run_id']}"
    run: dict[str, Any] = {}

    def has_ended() -> bool:
        run.update(client.get(run_url).json())
        return run["state"] in ("success", "failed")

    wait_until(has_ended, 200, workspace / "server.log")
    return run


def test_run_triggered_over_rest_answers_every_row(finished_run: dict[str, Any], workspace: Path) -> None:
    assert finished_run["state"] == "success"
    (job,) = (workspace / "out").iterdir()
    results = pq.read_table(job / "results").to_pylist()
    assert [(row["request_id"], row["finish_reason"]) for row in results] == [
        ("one", "length"),
        ("two", "length"),
        ("three", "rejected"),
    ]


def test_shards_have_readable_names(client: httpx.Client, finished_run: dict[str, Any]) -> None:
    run_url = f"/api/v2/dags/blendserve_batch/dagRuns/{finished_run['dag_run_id']}"
    tasks = client.get(f"{run_url}/taskInstances").json()["task_instances"]
    (name,) = [task["rendered_map_index"] for task in tasks if task["task_id"] == "batch.run_shard"]
    assert name.startswith("shard 0 · density ")


def test_results_asset_triggers_the_consumer(
    client: httpx.Client, finished_run: dict[str, Any], workspace: Path
) -> None:
    runs = "/api/v2/dags/blendserve_consumer_example/dagRuns"
    wait_until(
        lambda: [run["state"] for run in client.get(runs).json()["dag_runs"]] == ["success"],
        60,
        workspace / "server.log",
    )
    (event,) = client.get("/api/v2/assets/events").json()["asset_events"]
    (job,) = (workspace / "out").iterdir()
    assert event["extra"] == {"rows": 3, "failed": 1, "path": str(job / "results")}


def test_report_tab_shows_the_report_to_those_signed_in_only(
    client: httpx.Client, address: str, finished_run: dict[str, Any], workspace: Path
) -> None:
    views = [view for plugin in client.get("/api/v2/plugins").json()["plugins"] for view in plugin["external_views"]]
    (view,) = [view for view in views if view["url_route"] == "blendserve_report"]
    assert view["destination"] == "dag_run"
    path = view["href"].format(DAG_ID="blendserve_batch", RUN_ID=quote(finished_run["dag_run_id"], safe=""))

    page = client.get(path)
    assert page.status_code == 200
    (job,) = (workspace / "out").iterdir()
    assert page.text == (job / "report.html").read_text(encoding="utf-8")
    assert "sandbox allow-scripts;" in page.headers["content-security-policy"]
    assert httpx.get(address + path).status_code == 401
    assert httpx.get(address + path, headers={"Authorization": "Bearer forged"}).status_code == 403
    assert "no BlendServe job" in client.get("/blendserve/dags/blendserve_batch/report?run_id=unknown").text


@pytest.mark.parametrize(
    ("field", "value"), [("max_tokens", 0), ("policy", "best"), ("temperature", "hot"), ("stop", "text")]
)
def test_bad_param_is_refused_with_the_name_of_the_field(client: httpx.Client, field: str, value: Any) -> None:
    answer = trigger(client, **{field: value})
    assert answer.status_code == 400
    assert f"Invalid input for param {field}" in answer.json()["detail"]


def test_shard_marked_failed_stops_at_once_and_goes_on_when_cleared(client: httpx.Client, workspace: Path) -> None:
    rows = {"request_id": [f"row-{number}" for number in range(30)], "prompt": [f"number {n}" for n in range(30)]}
    pq.write_table(pa.table(rows), workspace / "many.parquet")
    params = {"input": "many.parquet", "output": "many", "max_tokens": 200, "ignore_eos": True, "max_num_seqs": 2}
    run_url = f"/api/v2/dags/blendserve_batch/dagRuns/{trigger(client, **params).json()['dag_run_id']}"
    log = workspace / "server.log"
    job = workspace / "many"
    wait_until(lambda: is_progressing(client, run_url), 150, log)
    assert engines_of(job)

    shard_url = f"{run_url}/taskInstances/batch.run_shard/0"
    assert client.patch(shard_url, json={"new_state": "failed"}).status_code == 200
    wait_until(lambda: not engines_of(job), 10, log)
    assert not (job / "completions" / "shard-00000" / "shard.json").exists(), "it was stopped in mid-shard"
    wait_until(lambda: client.get(run_url).json()["state"] == "failed", 60, log)
    assert (job / "results").is_dir(), "merge ran: what is finished can be used"
    num_kept = num_completions(job)

    cleared = client.post(
        "/api/v2/dags/blendserve_batch/clearTaskInstances",
        json={"dry_run": False, "dag_run_id": run_url.rsplit("/", 1)[1], "only_failed": True},
    )
    assert cleared.status_code == 200, cleared.text
    wait_until(lambda: client.get(run_url).json()["state"] == "success", 200, log)
    results = pq.read_table(job / "results")
    assert results["num_completion_tokens"].to_pylist() == [200] * 30
    shard = httpx.Response(200, content=(job / "completions" / "shard-00000" / "shard.json").read_bytes()).json()
    assert shard["num_resumed"] == num_kept, "no finished request ran again"


def is_progressing(client: httpx.Client, run_url: str) -> bool:
    states = client.get(f"{run_url}/taskInstances/batch.run_shard/state-store?map_index=0").json()
    return bool(states.get("task_state_store"))


def engines_of(job: Path) -> list[str]:
    """The processes that run a shard of this job."""
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    return [command.decode() for command in commands if b"run_shard" in command and str(job).encode() in command]


def num_completions(job: Path) -> int:
    return sum(pq.read_metadata(part).num_rows for part in job.glob("completions/**/part-*.parquet"))


def trigger(client: httpx.Client, **params: Any) -> httpx.Response:
    return client.post("/api/v2/dags/blendserve_batch/dagRuns", json={"logical_date": None, "conf": params})


def wait_until(is_so: Any, seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.5)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports
