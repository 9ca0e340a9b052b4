"""A tiny input and an Airflow home of their own for the tests of the DAGs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.dags.airflow_cluster import AirflowCluster, missing_programs

NUM_ROWS = 12


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A working directory with `requests.parquet`: twelve rows, half of them under one shared instruction."""
    prompts = [f"Say yes or no to this: is {n} even?" if n % 2 else f"{n} things" for n in range(NUM_ROWS)]
    rows = {
        "request_id": [f"row-{n}" for n in range(NUM_ROWS)],
        "prompt": prompts,
        "kind": ["a", "b"] * (NUM_ROWS // 2),
    }
    pq.write_table(pa.table(rows), tmp_path / "requests.parquet")
    return tmp_path


@pytest.fixture(scope="session")
def own_environment() -> dict[str, str]:
    """This process's environment without another Airflow's settings."""
    return {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW")}


@pytest.fixture(scope="session")
def migrated_home(tmp_path_factory: pytest.TempPathFactory, own_environment: dict[str, str]) -> Path:
    """An Airflow home with its database made, to copy: making one takes longer than a small run."""
    home = tmp_path_factory.mktemp("airflow") / "home"
    subprocess.run(
        [sys.executable, "-c", "from blendserve.airflow.standalone import prepare; prepare()"],
        env=own_environment | {"AIRFLOW_HOME": str(home), "AIRFLOW__CORE__LOAD_EXAMPLES": "False"},
        check=True,
        capture_output=True,
        timeout=120,
    )
    return home


@pytest.fixture
def airflow_environment(
    workspace: Path, tiny_model: Path, migrated_home: Path, own_environment: dict[str, str]
) -> dict[str, str]:
    """Environment of an Airflow of this test's own; its form may use the workspace and the tiny model only."""
    shutil.copytree(migrated_home, workspace / "airflow")
    return own_environment | {
        "BLENDSERVE_AIRFLOW_HOME": str(workspace / "airflow"),
        "AIRFLOW__BLENDSERVE__ALLOWED_PATHS": f"{workspace},{tiny_model}",
        "AIRFLOW__BLENDSERVE__RETRY_DELAY_SECONDS": "1",
    }


@pytest.fixture(scope="session")
def cluster(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, own_environment: dict[str, str]
) -> Iterator[AirflowCluster]:
    """A running Airflow with an input of three rows, one of them without a prompt."""
    if missing := missing_programs():
        skip_here(f"{', '.join(missing)} not installed; tests/dags/install_programs.sh brings them")
    folder = tmp_path_factory.mktemp("cluster")
    rows = {"request_id": ["one", "two", "three"], "prompt": ["tell nobody", "tell nobody else", None]}
    pq.write_table(pa.table(rows), folder / "requests.parquet")
    environment = own_environment | {
        "AIRFLOW__BLENDSERVE__DATA_FOLDER": str(folder),
        "AIRFLOW__BLENDSERVE__ALLOWED_PATHS": f"{folder},{tiny_model}",
        "AIRFLOW__BLENDSERVE__DEFAULT_MODEL": str(tiny_model),
        "AIRFLOW__BLENDSERVE__RETRY_DELAY_SECONDS": "1",
    }
    cluster = AirflowCluster(folder, environment)
    try:
        cluster.sign_in()
        yield cluster
    finally:
        cluster.stop()


def skip_here(reason: str) -> NoReturn:
    """Skip a test that this machine lacks programs for; in CI, which has to have them, fail it."""
    if os.environ.get("CI"):
        pytest.fail(f"CI must not skip this: {reason}")
    pytest.skip(reason)
