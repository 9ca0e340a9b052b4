"""The command line's own manners: options from the job's fields, JSON on stdout, messages on stderr, exit statuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from blendserve import cli
from blendserve.console import Console
from blendserve.errors import Interrupted, OutputError
from blendserve.schemas import RESULT_COLUMNS
from blendserve.spec import JobSpec

TARGET = ["--model", "llama-3.1-8b", "--hardware", "a100-80gb"]
WORKLOAD = ["--density", "1.4", "--sharing", "0.35", "--requests", "300", *TARGET]


def call(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("verb", ["run", "plan"])
def test_every_field_of_a_job_is_an_option(verb: str) -> None:
    text = call(verb, "--help").stdout
    for name in JobSpec.model_fields:
        assert f"--{name.replace('_', '-')}" in text


def test_every_verb_explains_itself() -> None:
    verbs = ("run", "plan", "run-shard", "merge", "report", "doctor", "simulate", "workload")
    for verb in verbs:
        assert call(verb, "--help").exit_code == 0
        assert verb in call("--help").stdout


def test_an_error_is_told_twice_once_for_people_once_for_programs(tmp_path: Path) -> None:
    done = call("report", tmp_path, "--json")
    assert done.exit_code == 2
    assert json.loads(done.stdout.splitlines()[-1])["error"] in done.stderr.replace("\n", "")


@pytest.mark.parametrize(
    ("error", "status"), [(OutputError("x"), 2), (Interrupted("x"), 130), (ZeroDivisionError("x"), 3)]
)
def test_exit_statuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, status: int) -> None:
    def fail(_root: Path) -> None:
        raise error

    monkeypatch.setattr(cli.job, "report", fail)
    done = call("report", tmp_path, "--json")
    assert done.exit_code == status
    assert json.loads(done.stdout.splitlines()[-1])["exit_status"] == status


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    """A folder of which `show` has what it needs; its name and its row look like marks of rich's and of a terminal."""
    folder = tmp_path / "out[/b]"
    (folder / "results").mkdir(parents=True)
    row = {"request_id": "[/x] :smile: \x1b[31m", "completion": "a\x1b]0;title\x07 [red]b[/c]", "finish_reason": "stop"}
    counts = dict.fromkeys(("num_prompt_tokens", "num_cached_tokens", "num_completion_tokens"), 1)
    pq.write_table(pa.Table.from_pylist([{**row, **counts}], RESULT_COLUMNS), folder / "results/part-00000.parquet")
    manifest = {"counts": {"input_rows": 1}, "tokens": counts, "spec": {"output": "where/it/was"}, "plan": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"results": ["results/part-00000.parquet"]}))
    return folder


def test_texts_of_rows_and_names_of_folders_are_shown_as_they_are(merged: Path) -> None:
    done = call("show", merged)
    assert done.exit_code == 0, done.stderr
    for shown in ("[/x] :smile:", "[red]b[/c]", f"report: {merged}/report.html"):
        assert shown in done.stdout
    assert "\x1b" not in done.stdout and "\x07" not in done.stdout


def test_removed_results_are_named(merged: Path) -> None:
    shutil.rmtree(merged / "results")
    done = call("show", merged, "--json")
    assert done.exit_code == 2
    assert "results/part-00000.parquet is not there" in json.loads(done.stdout)["error"]


@pytest.mark.parametrize("content", ["", '{"counts": ', "[]"])
def test_a_broken_manifest_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    done = call("show", tmp_path, "--json")
    assert done.exit_code == 2
    assert "manifest.json holds no JSON object" in json.loads(done.stdout.splitlines()[-1])["error"]


def test_a_shard_on_an_object_store_is_refused_by_name() -> None:
    done = call("run-shard", "s3://bucket/job", 0)
    assert done.exit_code == 2
    assert "got s3://bucket/job" in done.stderr


def test_repeated_stop_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[JobSpec] = []

    def run(spec: JobSpec, **_: Any) -> None:
        seen.append(spec)
        raise OutputError("enough")

    monkeypatch.setattr(cli.job, "run", run)
    call("run", "--input", "i", "--output", "o", "--stop", "A", "--stop", "B", "--raw", "--no-prefix-cache")
    assert (seen[0].stop, seen[0].raw, seen[0].prefix_cache) == (("A", "B"), True, False)


def test_demo_data_has_three_kinds(tmp_path: Path) -> None:
    done = call("demo-data", "--output", tmp_path / "x.parquet", "--rows", 40, "--json")
    assert json.loads(done.stdout.splitlines()[-1])["rows_by_kind"] == {"classify": 20, "summarize": 12, "write": 8}
    rows = pq.read_table(tmp_path / "x.parquet").to_pylist()
    assert len({row["id"] for row in rows}) == 40


@pytest.mark.parametrize("command", [["demo-data"], ["workload", *WORKLOAD]])
def test_a_file_that_can_not_be_written_is_named(tmp_path: Path, command: list[str]) -> None:
    done = call(*command, "--output", tmp_path, "--json")
    assert done.exit_code == 2
    assert f"{tmp_path.parent} can't be written" in json.loads(done.stdout)["error"]


def test_a_negative_seed_is_refused(tmp_path: Path) -> None:
    assert call("workload", *WORKLOAD, "--seed", -1, "--output", tmp_path / "w.parquet").exit_code == 2


def test_workload_then_simulate(tmp_path: Path) -> None:
    path = tmp_path / "w.parquet"
    made = call("workload", *WORKLOAD, "--output", path, "--json")
    assert made.exit_code == 0, made.stderr
    done = call("simulate", "--input", path, *TARGET, "--policies", "blend,dfs", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found["policies"]) == {"blend", "dfs"}
    for run in found["policies"].values():
        assert run["seconds"] >= found["bound_seconds"]
    refused = call("simulate", "--input", path, *TARGET, "--policies", "best")
    assert refused.exit_code == 2
    assert "Unknown policies: best" in refused.stderr


def test_small_and_large_figures_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    run = {"seconds": 0.0421, "tokens_per_second": 654.0, "prefix_sharing": 0.79, "num_preemptions": 0}
    hours = {"device_hours": 0.0188, "cost": 0.0565}
    found = {"policies": {"blend": {**run, **hours}}, "bound_seconds": 12_345.6, "prefix_sharing_optimal": 0.8}
    Console().simulation(found)
    Console().step("plan", {"predicted_seconds": 12_345.6, "density": 1.0})
    shown = capsys.readouterr().out
    assert {"0.0421", "0.0188", "0.0565"} <= set(shown.split())
    assert shown.split().count("12,346") == 2


def test_doctor_reports_what_it_found() -> None:
    done = call("doctor", "--json")
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"python", "torch", "duckdb", "gpu", "memory", "disk"} <= {finding["what"] for finding in found["findings"]}
    assert done.exit_code == (0 if found["is_fit"] else 2)
