"""The command line's own manners: options from the job's fields, JSON on stdout, messages on stderr, exit statuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from blendserve import cli
from blendserve.console import Console
from blendserve.errors import Interrupted, OutputError
from blendserve.spec import JobSpec


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


def test_workload_then_simulate(tmp_path: Path) -> None:
    target = ["--model", "llama-3.1-8b", "--hardware", "a100-80gb"]
    path = tmp_path / "w.parquet"
    made = call(
        *("workload", "--density", 1.4, "--sharing", 0.35, "--requests", 300, *target, "--output", path, "--json")
    )
    assert made.exit_code == 0, made.stderr
    done = call("simulate", "--input", path, *target, "--policies", "blend,dfs", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found["policies"]) == {"blend", "dfs"}
    for run in found["policies"].values():
        assert run["seconds"] >= found["bound_seconds"]
    refused = call("simulate", "--input", path, *target, "--policies", "best")
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
