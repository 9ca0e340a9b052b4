"""The DAG in one process, as `make demo` runs it: the real engine on a tiny model, failures with their reasons."""

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

import fsspec
import pyarrow.parquet as pq
import pytest

from blendserve.airflow.standalone import is_healthy
from tests import object_store as stores

DAGS = Path(__file__).resolve().parents[2] / "dags"


def start(environment: dict[str, str], workspace: Path, dag_id: str, dags: Path = DAGS, **params: Any) -> Any:
    command = [sys.executable, "-m", "blendserve.airflow.standalone", "--dags", str(dags), "run", dag_id]
    return subprocess.Popen(
        [*command, "--conf", json.dumps(params)],
        cwd=workspace,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(environment: dict[str, str], workspace: Path, dag_id: str, dags: Path = DAGS, **params: Any) -> tuple[int, str]:
    process = start(environment, workspace, dag_id, dags, **params)
    output, _ = process.communicate(timeout=200)
    return process.returncode, output


def test_batch_answers_every_row(airflow_environment: dict[str, str], workspace: Path, tiny_model: Path) -> None:
    params: dict[str, Any] = {"model": str(tiny_model), "max_tokens": 5, "shards": 3, "ignore_eos": True}
    status, output = run(
        airflow_environment, workspace, "blendserve_batch", input="requests.parquet", output="out/{run_id}", **params
    )
    assert status == 0, output
    assert all(f"shard={number}" in output for number in range(3))

    (job,) = (workspace / "out").glob("[!.]*")
    results = pq.read_table(job / "results")
    assert results["request_id"].to_pylist() == [f"row-{number}" for number in range(12)]
    assert set(results["finish_reason"].to_pylist()) == {"length"}
    assert results["kind"].to_pylist() == ["a", "b"] * 6
    assert (job / "_SUCCESS").is_file()
    assert (job / "report.html").is_file()


def test_airflow_dags_test_runs_the_dag(airflow_environment: dict[str, str], workspace: Path, tiny_model: Path) -> None:
    """Airflow's own command, with nothing of ours around it."""
    params = {"input": "requests.parquet", "output": "out/job", "model": str(tiny_model), "max_tokens": 3}
    done = subprocess.run(
        [sys.executable, "-m", "airflow", "dags", "test", "blendserve_batch", "--conf", json.dumps(params)],
        cwd=workspace,
        env=airflow_environment
        | {
            "AIRFLOW_HOME": airflow_environment["BLENDSERVE_AIRFLOW_HOME"],
            "AIRFLOW__CORE__DAGS_FOLDER": str(DAGS),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        },
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (workspace / "out/job/_SUCCESS").is_file()
    assert pq.read_table(workspace / "out/job/results").num_rows == 12


def test_own_dag_stopped_in_mid_shard_goes_on(
    airflow_environment: dict[str, str], workspace: Path, tiny_model: Path
) -> None:
    """A DAG of a team's own, with Airflow templates in its options and Jinja over the rows in its prompt template."""
    dags = workspace / "dags"
    dags.mkdir()
    (dags / "own.py").write_text(
        f"""
from airflow.sdk import DAG
from blendserve.airflow import BlendServeBatch

with DAG("own", schedule=None, params={{"name": "first"}}):
    BlendServeBatch(
        input="{workspace}/requests.parquet",
        output="{workspace}/out/{{{{ params.name }}}}",
        model={str(tiny_model)!r},
        template="Is it {{{{ kind }}}}? {{{{ prompt }}}}",
        max_tokens=150,
        ignore_eos=True,
        max_num_seqs=1,
        retries=0,
    )
"""
    )
    job = workspace / "out" / "first"
    process = start(airflow_environment, workspace, "own", dags)
    wait_for(lambda: bool(list(job.glob("completions/shard-00000/*"))))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert not (job / "_SUCCESS").exists()

    status, output = run(airflow_environment, workspace, "own", dags)
    assert status == 0, output
    assert pq.read_table(job / "results")["num_completion_tokens"].to_pylist() == [150] * 12
    prompts = pq.read_table(job / "work" / "requests.parquet")["prompt"].to_pylist()
    assert prompts[:2] == ["Is it a? 0 things", "Is it b? Say yes or no to this: is 1 even?"]


def test_own_dag_from_object_store_to_object_store(
    airflow_environment: dict[str, str],
    workspace: Path,
    tiny_model: Path,
    object_store: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Credentials come from a connection, which an ObjectStoragePath names; the query from a file beside the DAG."""
    bucket = stores.use(monkeypatch, object_store)
    fsspec.filesystem("s3").put_file(str(workspace / "requests.parquet"), f"{bucket}/in/requests.parquet")
    dags = workspace / "dags"
    dags.mkdir()
    (dags / "rows.sql").write_text("select * from input where kind = '{{ params.kind }}'")
    (dags / "own.py").write_text(
        f"""
from airflow.sdk import DAG, ObjectStoragePath
from blendserve.airflow import BlendServeBatch

with DAG("own", schedule=None, params={{"kind": "b"}}):
    BlendServeBatch(
        input=ObjectStoragePath("{bucket}/in", conn_id="store"),
        output="{bucket}/out/{{{{ params.kind }}}}",
        model={str(tiny_model)!r},
        sql="rows.sql",
        max_tokens=3,
        shards=2,
        retries=0,
    )
"""
    )
    connection = {
        "conn_type": "blendserve_object_store",
        "login": "test",
        "password": "test",
        "extra": {"endpoint_url": object_store["AWS_ENDPOINT_URL"], "region_name": "us-east-1"},
    }
    environment = {name: value for name, value in airflow_environment.items() if not name.startswith("AWS_")}
    status, output = run(environment | {"AIRFLOW_CONN_STORE": json.dumps(connection)}, workspace, "own", dags)
    assert status == 0, output
    results = pq.read_table(f"{bucket.removeprefix('s3://')}/out/b/results", filesystem=fsspec.filesystem("s3"))
    assert results["request_id"].to_pylist() == [f"row-{number}" for number in range(1, 12, 2)]
    assert fsspec.filesystem("s3").exists(f"{bucket}/out/b/_SUCCESS")
    assert "s3:" not in [path.name for path in workspace.iterdir()], "no URL was taken for a path"


def test_make_airflow_starts_one_that_is_healthy(airflow_environment: dict[str, str], workspace: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "blendserve.airflow.standalone", "--dags", str(DAGS), "--port", str(port)]
    environment = airflow_environment | {"PYTHONUNBUFFERED": "1"}
    output = workspace / "output.txt"
    with output.open("w") as file:
        process = subprocess.Popen(command, cwd=workspace, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: f"Airflow is ready: http://127.0.0.1:{port}" in output.read_text())
        assert is_healthy(f"http://127.0.0.1:{port}")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


@pytest.mark.parametrize(("conf", "reason"), [("[1]", "expected an object"), ("{", "is not JSON")])
def test_params_that_are_no_json_object_are_refused(tmp_path: Path, conf: str, reason: str) -> None:
    command = [sys.executable, "-m", "blendserve.airflow.single_run", "blendserve_batch", conf]
    done = subprocess.run(
        command, env={"AIRFLOW_HOME": str(tmp_path)}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert reason in done.stdout + done.stderr


def wait_for(is_there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not is_there():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.1)
