"""What the trigger form may state: limits of paths, names of wrong fields, empty fields."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from blendserve.airflow.job_options import job_spec, path_name
from blendserve.errors import UsageError


@pytest.fixture
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path / "airflow"))
    monkeypatch.setenv("AIRFLOW__BLENDSERVE__DATA_FOLDER", str(folder))
    return folder


def from_form(**form: Any) -> Any:
    return job_spec({}, {"input": "in.parquet", "output": "out", **form}, "run-1")


def test_relative_paths_start_at_the_data_folder_and_run_id_is_filled_in(data_folder: Path) -> None:
    spec = from_form(output="runs/{run_id}")
    assert (spec.input, spec.output) == (f"{data_folder}/in.parquet", f"{data_folder}/runs/run-1")


def test_form_wins_over_the_options_of_the_dag(data_folder: Path) -> None:
    spec = job_spec({"input": "a", "output": "b", "max_tokens": 5, "top_k": 7}, {"max_tokens": 6}, "run")
    assert (spec.max_tokens, spec.top_k) == (6, 7)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input", "/etc/passwd"),
        ("input", "../other/in.parquet"),
        ("input", "sub/../../other/*.parquet"),
        ("input", "../*/in.parquet"),
        ("input", "s3://bucket/in.parquet"),
        ("output", "/tmp/elsewhere"),
        ("output", "../data-of-others"),
        ("model", "/root/model"),
        ("model", "../model"),
        ("hardware", "/opt/airflow/simple_auth_manager_passwords.json"),
        ("hardware", "../others.json"),
    ],
)
def test_paths_outside_the_allowed_folders_are_refused(data_folder: Path, field: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"Option '{field}'.*allowed_paths"):
        from_form(**{field: value})


def test_link_out_of_the_allowed_folders_is_refused(data_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (data_folder / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(UsageError, match="Option 'input'"):
        from_form(input="link/in.parquet")


def test_folder_whose_name_only_starts_like_an_allowed_one_is_refused(data_folder: Path) -> None:
    with pytest.raises(UsageError, match="Option 'output'"):
        from_form(output=f"{data_folder}-of-others/out")


def test_administrator_can_allow_folders_and_object_stores(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW__BLENDSERVE__ALLOWED_PATHS", f"{tmp_path}/shared, s3://bucket/prompts")
    spec = from_form(input="s3://bucket/prompts/day=*/x.parquet", output=f"{tmp_path}/shared/out")
    assert spec.input == "s3://bucket/prompts/day=*/x.parquet"
    for refused in ("s3://bucket/prompts-of-others/x.parquet", "s3://bucket/prompts/../x.parquet", "in.parquet"):
        with pytest.raises(UsageError, match="Option 'input'"):
            from_form(input=refused, output=f"{tmp_path}/shared/out")


def test_author_of_a_dag_may_use_any_path(data_folder: Path) -> None:
    spec = job_spec({"input": "/elsewhere/in.parquet", "output": "/elsewhere/out"}, {}, "run")
    assert spec.input == "/elsewhere/in.parquet"


def test_short_and_hub_names_of_models_are_no_paths(data_folder: Path) -> None:
    assert from_form(model="smollm2").model == "smollm2"
    assert from_form(model="HuggingFaceTB/SmolLM2-135M-Instruct").model == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_names_of_hardware_are_no_paths_and_profiles_lie_in_the_data_folder(data_folder: Path) -> None:
    assert from_form(hardware="4xh100").hardware == "4xh100"
    assert from_form(hardware="profiles/h100.json").hardware == f"{data_folder}/profiles/h100.json"


def test_folder_below_the_data_folder_is_a_model(data_folder: Path) -> None:
    (data_folder / "models" / "small").mkdir(parents=True)
    assert from_form(model="models/small").model == f"{data_folder}/models/small"


def test_emptied_optional_fields_are_not_stated(data_folder: Path) -> None:
    spec = from_form(template="", system="", num_blocks=None)
    assert (spec.template, spec.system, spec.num_blocks) == (None, None, None)


def test_every_wrong_field_is_named(data_folder: Path) -> None:
    with pytest.raises(UsageError) as caught:
        from_form(max_tokens=0, policy="best", select="*", stop=[""])
    assert all(f"'{name}'" in str(caught.value) for name in ("max_tokens", "policy", "select"))


@pytest.mark.parametrize("run_id", ["../../etc", "a/b", "..", "", "manual__2026-11-22T08:02:23+00:00"])
def test_run_id_becomes_one_folder_name(run_id: str) -> None:
    name = path_name(run_id)
    assert name and "/" not in name and ":" not in name and not name.startswith(".")


@pytest.mark.parametrize(
    "value",
    ["s3://me:hunter2@bucket/x", "https://host/x.parquet?sig=hunter2", "s3://b/x?X-Amz-Security-Token=hunter2&a=b"],
)
def test_passwords_do_not_belong_into_the_form(data_folder: Path, value: str) -> None:
    with pytest.raises(UsageError, match="Option 'input' holds a password or token") as caught:
        from_form(input=value)
    assert "hunter2" not in str(caught.value)


def test_make_demo_takes_a_folder_outside_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = ["make", "--dry-run", "demo", f"OUT={tmp_path}"]
    printed = subprocess.run(make, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True).stdout
    (words,) = [shlex.split(line) for line in printed.splitlines() if "standalone run" in line]
    for word in words[: words.index(".venv/bin/python")]:
        monkeypatch.setenv(*word.split("=", 1))
    assert job_spec({}, json.loads(words[-1]), "run").output == f"{tmp_path}/demo/job"
