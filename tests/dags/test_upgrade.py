"""A run that an earlier version started goes on: its stored DAG is read, and every task of it still has its class."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

STORED = Path(__file__).with_name("serialized_dag_0.1.0.json")
DAGS = Path(__file__).resolve().parents[2] / "dags"

COMPARE = """
import json, sys
from importlib import import_module
from pathlib import Path
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk import BaseOperator
from airflow.serialization.serialized_objects import DagSerialization

def describe(encoded):
    dag = DagSerialization.from_dict(encoded)
    return {
        "tasks": {task.task_id: [sorted(task.upstream_task_ids), task.is_mapped] for task in dag.tasks},
        "params": {name: param.value for name, param in dag.params.items()},
    }

stored = json.loads(Path(sys.argv[1]).read_text())
missing = []
for task in stored["dag"]["tasks"]:
    place = import_module(task["__var"]["_task_module"])
    operator = getattr(place, task["__var"]["task_type"], None)
    if not (isinstance(operator, type) and issubclass(operator, BaseOperator)):
        missing.append(task["__var"]["task_type"])
now = DagSerialization.to_dict(DagBag(sys.argv[2]).dags["blendserve_batch"])
print(json.dumps({"stored": describe(stored), "now": describe(json.loads(json.dumps(now))), "missing": missing}))
"""


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = str(tmp_path_factory.mktemp("airflow_home"))
    done = subprocess.run(
        [sys.executable, "-c", COMPARE, str(STORED), str(DAGS)],
        env={"AIRFLOW_HOME": home, "AIRFLOW__CORE__LOAD_EXAMPLES": "False", "HOME": home},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_every_stored_task_has_its_class(compared: dict[str, Any]) -> None:
    assert compared["missing"] == []


def test_tasks_of_a_stored_run_are_those_of_today(compared: dict[str, Any]) -> None:
    assert compared["stored"]["tasks"] == compared["now"]["tasks"]


def test_params_of_a_stored_run_are_still_taken(compared: dict[str, Any]) -> None:
    from blendserve.spec import JobSpec

    JobSpec.model_validate(compared["stored"]["params"])
    assert set(compared["stored"]["params"]) <= set(compared["now"]["params"])
