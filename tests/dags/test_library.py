"""What the form may name, what it may state as text, and that neither leads anywhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from blendserve.airflow.form import form_params
from blendserve.airflow.job_options import job_spec
from blendserve.errors import UsageError


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library with one name of each kind, beside files that aren't in it."""
    root = tmp_path / "library"
    for folder in ("templates", "sql"):
        (root / folder).mkdir(parents=True)
    (root / "datasets.yaml").write_text("reviews: s3://team/reviews\nitems: /elsewhere/items.parquet\n")
    (root / "templates" / "sentiment.jinja").write_text("Positive or negative? {{ body }}\n")
    (root / "sql" / "recent.sql").write_text("select * from input where day > 3\n")
    (root / "sql" / "notes.txt").write_text("not for the form")
    (tmp_path / "passwords.sql").write_text("hunter2")
    (tmp_path / "passwords.jinja").write_text("hunter2")
    monkeypatch.setenv("AIRFLOW__BLENDSERVE__DATA_FOLDER", str(tmp_path))
    monkeypatch.setenv("AIRFLOW__BLENDSERVE__LIBRARY_FOLDER", str(root))
    return root


def from_form(**form: Any) -> Any:
    return job_spec({}, {"input": "in.parquet", "output": "out", **form}, "run-1")


def test_names_stand_for_what_the_administrator_put_there(library: Path) -> None:
    spec = from_form(dataset="reviews", template_file="sentiment", sql_file="recent")
    assert spec.input == "s3://team/reviews", "outside the allowed paths, but the administrator's own"
    assert spec.template == "Positive or negative? {{ body }}"
    assert spec.sql == "select * from input where day > 3"


def test_form_offers_the_names(library: Path) -> None:
    params = form_params()
    assert next(iter(params)) == "dataset" and params["dataset"].schema["enum"] == [None, "items", "reviews"]
    assert params["template_file"].schema["enum"] == [None, "sentiment"]
    assert params["sql_file"].schema["enum"] == [None, "recent"]
    assert {params[name].schema["section"] for name in ("template_file", "sql_file")} == {"Prompts"}
    assert all(
        param.value is None for name, param in params.items() if name in ("dataset", "template_file", "sql_file")
    )


@pytest.mark.parametrize("field", ["dataset", "template_file", "sql_file"])
@pytest.mark.parametrize(
    "name",
    [
        "../../passwords",
        "../passwords",
        "..",
        "/etc/passwd",
        "sub/../../passwords",
        "notes.txt",
        "notes",
        "recent.sql",
        "sentiment\x00",
        "unknown",
        "{{ conf }}",
        "s3://team/other",
    ],
)
def test_other_names_are_refused(library: Path, field: str, name: str) -> None:
    with pytest.raises(UsageError, match=f"Option '{field}': .* is not in the library") as caught:
        from_form(**{field: name})
    assert "hunter2" not in str(caught.value)


def test_link_in_the_library_is_the_administrators_business(library: Path, tmp_path: Path) -> None:
    (library / "sql" / "linked.sql").symlink_to(tmp_path / "passwords.sql")
    assert from_form(sql_file="linked").sql == "hunter2"


def test_name_and_text_exclude_each_other(library: Path) -> None:
    with pytest.raises(UsageError, match="Option 'template_file': 'template' is stated too"):
        from_form(template_file="sentiment", template="{{ body }}")


def test_broken_list_of_datasets_is_named(library: Path) -> None:
    (library / "datasets.yaml").write_text("- reviews\n")
    with pytest.raises(UsageError, match=r"datasets\.yaml: expected a mapping"):
        from_form(dataset="reviews")


def test_without_a_library_there_are_no_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__BLENDSERVE__DATA_FOLDER", str(tmp_path))
    assert not {"dataset", "template_file", "sql_file"} & set(form_params())
    with pytest.raises(UsageError, match="It has: none"):
        from_form(dataset="reviews")


def test_sql_as_text_is_off_unless_the_administrator_turns_it_on(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "sql" not in form_params()
    with pytest.raises(UsageError, match=r"Option 'sql': the trigger form may not.*allow_free_sql"):
        from_form(sql="select * from input")
    monkeypatch.setenv("AIRFLOW__BLENDSERVE__ALLOW_FREE_SQL", "True")
    assert form_params()["sql"].schema["format"] == "multiline"
    assert from_form(sql="select * from input").sql == "select * from input"


def test_templates_as_text_can_be_turned_off(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert from_form(template="{{ body }}").template == "{{ body }}"
    monkeypatch.setenv("AIRFLOW__BLENDSERVE__ALLOW_FREE_TEMPLATE", "False")
    assert "template" not in form_params()
    with pytest.raises(UsageError, match="Option 'template': the trigger form may not"):
        from_form(template="{{ body }}")
    assert from_form(template_file="sentiment").template


def test_author_of_a_dag_may_state_both(library: Path) -> None:
    spec = job_spec({"input": "a", "output": "b", "sql": "from input", "template": "{{ x }}"}, {}, "run")
    assert (spec.sql, spec.template) == ("from input", "{{ x }}")


def test_proposed_values_of_unknown_fields_are_refused(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert form_params(max_tokens=8, dataset="items")["max_tokens"].value == 8
    for name in ("max_token", "sql"):
        with pytest.raises(UsageError, match=rf"The form has no field\(s\) {name}\. It has: .*max_tokens"):
            form_params(**{name: 8})
