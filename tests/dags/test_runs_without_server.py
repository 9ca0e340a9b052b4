"""The DAG in one process, as `make demo` runs it: the real engine on a tiny model, failures with their reasons."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blendserve import job
from blendserve.airflow.standalone import is_healthy
from blendserve.job_record import holding
from blendserve.manifest import ShardManifest, read_manifest
from blendserve.spec import JobSpec
from tests import object_store as stores
from tests.dags.long_runs import engines_of

NUM_SLOW_ROWS = 36
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
    params: dict[str, Any] = {"model": str(tiny_model), "max_tokens": 5, "shards": 2, "ignore_eos": True}
    status, output = run(
        airflow_environment, workspace, "blendserve_batch", input="requests.parquet", output="out/{run_id}", **params
    )
    assert status == 0, output
    assert all(f"shard={number}" in output for number in range(2))

    (root,) = (workspace / "out").glob("[!.]*")
    results = pq.read_table(root / "results")
    assert results["request_id"].to_pylist() == [f"row-{number}" for number in range(12)]
    assert set(results["finish_reason"].to_pylist()) == {"length"}
    assert results["kind"].to_pylist() == ["a", "b"] * 6
    assert (root / "_SUCCESS").is_file()
    assert (root / "report.html").is_file()


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
    root = workspace / "out" / "first"
    process = start(airflow_environment, workspace, "own", dags)
    wait_for(lambda: bool(list(root.glob("completions/shard-00000/*"))))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert not (root / "_SUCCESS").exists()

    status, output = run(airflow_environment, workspace, "own", dags)
    assert status == 0, output
    assert pq.read_table(root / "results")["num_completion_tokens"].to_pylist() == [150] * 12
    prompts = pq.read_table(root / "work" / "requests.parquet")["prompt"].to_pylist()
    assert prompts[:2] == ["Is it a? 0 things", "Is it b? Say yes or no to this: is 1 even?"]


def test_shard_that_takes_too_long_stops_and_its_retry_goes_on(
    airflow_environment: dict[str, str], workspace: Path, tiny_model: Path
) -> None:
    """Each attempt may take four seconds more than the one before, so that some attempt times out and some ends."""
    numbers = range(NUM_SLOW_ROWS)
    pq.write_table(pa.table({"prompt": [f"number {number}" for number in numbers]}), workspace / "slow.parquet")
    root = workspace / "out" / "slow"
    options = {"max_tokens": 200, "ignore_eos": True, "max_num_seqs": 1, "shards": 1, "sample_fraction": 0.0}
    spec = JobSpec(input=str(workspace / "slow.parquet"), output=str(root), model=str(tiny_model), **options)
    job.extract(spec)
    for step in (job.tokenize, job.analyze, job.plan):
        step(root)
    dags = workspace / "dags"
    dags.mkdir()
    (dags / "own.py").write_text(
        f"""
from datetime import timedelta
from airflow.sdk import DAG
from blendserve.airflow import RunShardOperator

def allow_more_time(context):
    context["task"].execution_timeout = timedelta(seconds=4 * context["ti"].try_number)

with DAG("own", schedule=None):
    RunShardOperator.partial(
        task_id="run_shard", root="{root}", pre_execute=allow_more_time, retries=20, retry_delay=timedelta(0)
    ).expand(shard=[{{"shard": 0, "density": 1.0}}])
"""
    )
    with start(airflow_environment, workspace, "own", dags) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "Process timed out" in line:
                check_that_engines_end(root, seconds=5)
    assert process.returncode == 0, "".join(lines)
    assert any("Process timed out" in line for line in lines)
    shard = read_manifest(root / "completions" / "shard-00000" / "shard.json", ShardManifest)
    assert 0 < shard.num_resumed < NUM_SLOW_ROWS
    with holding(root) as lease:
        job.merge(root, lease)
    assert pq.read_table(root / "results")["num_completion_tokens"].to_pylist() == [200] * NUM_SLOW_ROWS


def check_that_engines_end(root: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while engines_of(root):
        assert time.monotonic() < deadline, "the engine runs on"
        time.sleep(0.05)


def test_own_dag_from_object_store_to_object_store(
    airflow_environment: dict[str, str],
    workspace: Path,
    tiny_model: Path,
    object_store: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By Airflow's own command, which writes OpenLineage's events to a file. Credentials come from a connection, which
    an ObjectStoragePath names; the query from a file beside the DAG."""
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
    events = workspace / "events.jsonl"
    transport = {"type": "file", "log_file_path": str(events), "append": True}
    environment = {name: value for name, value in airflow_environment.items() if not name.startswith("AWS_")} | {
        "AIRFLOW_HOME": airflow_environment["BLENDSERVE_AIRFLOW_HOME"],
        "AIRFLOW_CONN_STORE": json.dumps(connection),
        "AIRFLOW__CORE__DAGS_FOLDER": str(dags),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__OPENLINEAGE__TRANSPORT": json.dumps(transport),
    }
    done = subprocess.run(
        [sys.executable, "-m", "airflow", "dags", "test", "own"],
        cwd=workspace,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = pq.read_table(f"{bucket.removeprefix('s3://')}/out/b/results", filesystem=fsspec.filesystem("s3"))
    assert results["request_id"].to_pylist() == [f"row-{number}" for number in range(1, 12, 2)]
    assert fsspec.filesystem("s3").exists(f"{bucket}/out/b/_SUCCESS")
    assert "s3:" not in [path.name for path in workspace.iterdir()], "no URL was taken for a path"
    check_lineage([json.loads(line) for line in events.read_text().splitlines()], bucket)


def check_lineage(events: list[dict[str, Any]], bucket: str) -> None:
    """The events are those of OpenLineage's own provider; merge's says what the job read and wrote."""
    (merged,) = [
        event for event in events if event["job"]["name"] == "own.blendserve.merge" and event["eventType"] == "COMPLETE"
    ]
    assert "providers-openlineage" in merged["producer"]
    (read,), (written,) = merged["inputs"], merged["outputs"]
    assert (read["namespace"], read["name"]) == (bucket, "in")
    assert (written["namespace"], written["name"]) == (bucket, "out/b/results")
    assert "completion" in [field["name"] for field in written["facets"]["schema"]["fields"]]
    assert written["outputFacets"]["outputStatistics"]["rowCount"] == 6
    job_facet = merged["run"]["facets"]["blendserve"]
    assert (job_facet["counts"]["succeeded"], len(job_facet["fingerprint"]) > 8) == (6, True)


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


def test_port_that_another_server_has_is_named(tmp_path: Path) -> None:
    """That server may be an Airflow: a healthy answer would pass for one of the Airflow that could not start."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "blendserve.airflow.standalone", "--port", port],
            env={"BLENDSERVE_AIRFLOW_HOME": str(tmp_path / "airflow"), "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr.startswith(f"Port {port} of localhost can't be used: ") and "make airflow PORT=" in done.stderr
    assert not (tmp_path / "airflow").exists()


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
