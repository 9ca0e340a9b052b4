"""The DAG files: they parse, quickly and without heavy imports; their form is complete; their tasks are wired right."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DAGS = Path(__file__).resolve().parents[2] / "dags"

DESCRIBE = """
import json, os, sys
os.environ["AIRFLOW__CORE__UNIT_TEST_MODE"] = "False"
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk.definitions.mappedoperator import MappedOperator
from airflow.serialization.serialized_objects import DagSerialization

bag = DagBag(sys.argv[1])
dags = {}
for dag_id, dag in bag.dags.items():
    DagSerialization.deserialize_dag(DagSerialization.serialize_dag(dag))
    params = {name: dag.params.get_param(name) for name in dag.params}
    dags[dag_id] = {
        "params": {
            name: {"default": param.resolve(), "description": param.description, **param.schema}
            for name, param in params.items()
        },
        "tasks": {
            task.task_id: {
                "upstream": sorted(task.upstream_task_ids),
                "pool": task.pool,
                "rule": task.trigger_rule,
                "is_mapped": isinstance(task, MappedOperator),
                "outlets": [asset.name for asset in task.outlets],
            }
            for task in dag.tasks
        },
        "doc": dag.doc_md,
    }
heavy = [name for name in ("torch", "duckdb", "pyarrow", "transformers", "triton", "plotly") if name in sys.modules]
print(json.dumps({"errors": bag.import_errors, "dags": dags, "heavy": heavy}))
"""


@pytest.fixture(scope="module")
def parsed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a fresh Airflow process sees in `dags/`."""
    return parse(DAGS, tmp_path_factory.mktemp("airflow_home"))


def parse(folder: Path, home: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", DESCRIBE, str(folder)],
        env={"AIRFLOW_HOME": str(home), "AIRFLOW__CORE__LOAD_EXAMPLES": "False", "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_every_file_parses(parsed: dict[str, Any]) -> None:
    assert parsed["errors"] == {}
    assert set(parsed["dags"]) == {"blendserve_batch", "blendserve_plan_only", "blendserve_consumer_example"}
    assert all(dag["doc"] for dag in parsed["dags"].values())


def test_parsing_imports_nothing_heavy(parsed: dict[str, Any]) -> None:
    assert parsed["heavy"] == []


def test_form_has_every_field_of_the_job_spec_but_sql(parsed: dict[str, Any]) -> None:
    from blendserve.spec import JobSpec

    for dag_id in ("blendserve_batch", "blendserve_plan_only"):
        assert set(parsed["dags"][dag_id]["params"]) == set(JobSpec.model_fields) - {"sql"}


def test_every_param_has_title_description_and_valid_default(parsed: dict[str, Any]) -> None:
    for dag_id in ("blendserve_batch", "blendserve_plan_only"):
        params = parsed["dags"][dag_id]["params"]
        for name, param in params.items():
            assert param["title"], name
            assert param["description"] is None and param["description_md"], "only the latter is shown as Markdown"
            assert set(param.get("values_display", ())) == set(param.get("enum", ())), name
            if param["default"] is None:
                assert "null" in param["type"], name


def test_defaults_are_a_valid_job(parsed: dict[str, Any]) -> None:
    from blendserve.spec import JobSpec

    params = parsed["dags"]["blendserve_batch"]["params"]
    spec = JobSpec.model_validate({name: param["default"] for name, param in params.items()})
    stated = {"input", "output", "model"}
    assert spec.model_dump(exclude=stated) == JobSpec.model_validate({"input": "a", "output": "b"}).model_dump(
        exclude=stated
    )


def test_required_fields_stand_open_and_the_others_in_sections(parsed: dict[str, Any]) -> None:
    params = parsed["dags"]["blendserve_batch"]["params"]
    open_fields = [name for name, param in params.items() if "section" not in param]
    assert open_fields == ["input", "output", "model", "max_tokens"]
    assert list(params)[:4] == open_fields
    sections = list(dict.fromkeys(param["section"] for param in params.values() if "section" in param))
    assert sections == ["Prompts", "Sampling", "Planning", "Engine"]


def test_steps_run_in_order_and_engine_tasks_take_gpu_slots(parsed: dict[str, Any]) -> None:
    tasks = parsed["dags"]["blendserve_batch"]["tasks"]
    order = ["preflight", "extract", "tokenize", "analyze", "sample", "plan", "run_shard", "merge", "report", "gate"]
    names = [f"batch.{name}" for name in order]
    assert set(tasks) == set(names)
    for number, name in enumerate(names[1:]):
        assert names[number] in tasks[name]["upstream"], name
    assert [name for name in names if tasks[name]["pool"] == "gpu"] == ["batch.sample", "batch.run_shard"]
    assert [name for name in names if tasks[name]["is_mapped"]] == ["batch.run_shard"]
    assert tasks["batch.merge"]["upstream"] == ["batch.plan", "batch.run_shard"]
    assert tasks["batch.merge"]["rule"] == "all_done_min_one_success"
    assert tasks["batch.gate"]["upstream"] == ["batch.report", "batch.run_shard"]
    assert tasks["batch.gate"]["outlets"] == ["blendserve_results"]


def test_plan_only_takes_no_gpu_slot(parsed: dict[str, Any]) -> None:
    tasks = parsed["dags"]["blendserve_plan_only"]["tasks"]
    assert {task["pool"] for task in tasks.values()} == {"default_pool"}
    steps = ["preflight", "extract", "tokenize", "analyze", "plan", "report"]
    assert list(tasks) == [f"preview.{step}" for step in steps]


def test_unknown_option_of_a_task_group_is_an_import_error(tmp_path: Path) -> None:
    (tmp_path / "dags").mkdir()
    (tmp_path / "dags" / "wrong.py").write_text(
        "from airflow.sdk import DAG\nfrom blendserve.airflow import BlendServeBatch\n"
        "with DAG('wrong'):\n    BlendServeBatch(input='a', output='b', max_token=3)\n"
    )
    (message,) = parse(tmp_path / "dags", tmp_path)["errors"].values()
    assert "Unknown option(s) max_token" in message


def test_every_option_of_the_configuration_is_documented() -> None:
    from blendserve.airflow.configuration import OPTIONS

    page = (DAGS.parent / "docs" / "airflow.md").read_text(encoding="utf-8")
    for option in OPTIONS.values():
        default = f"`{option.default}`" if option.default else ""
        assert f"| `{option.name}` | {default}".rstrip() in page


def test_links_between_the_pages_lead_somewhere() -> None:
    docs = DAGS.parent / "docs"
    for page in docs.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (docs / target).exists(), f"{page.name}: {target}"
