"""From rows to requests: ids, prompts of every kind, templates, and the reason of every row that can't run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blendserve import job
from blendserve.errors import BlendServeError, InputError, UsageError
from blendserve.extract import extract_requests
from blendserve.input_files import open_input
from blendserve.job_folder import JobFolder
from blendserve.spec import load_job

NOT_UTF8 = b"caf\xe9"


def extract(tmp_path: Path, table: pa.Table, **options: Any) -> list[dict[str, Any]]:
    pq.write_table(table, tmp_path / "input.parquet")
    spec = load_job(None, {"input": str(tmp_path / "input.parquet"), "output": str(tmp_path / "job"), **options})
    folder = JobFolder(tmp_path / "job")
    extract_requests(spec, open_input(spec.input), folder)
    assert pq.read_table(folder.relation("input_rows")).equals(table)
    rows: list[dict[str, Any]] = pq.read_table(folder.relation("requests")).to_pylist()
    for row in rows:
        kinds = ("prompt", "messages", "prompt_token_ids", "error")
        assert sum(row[kind] is not None for kind in kinds) == 1
    return rows


def test_rows_are_numbered_without_an_id_column(tmp_path: Path) -> None:
    rows = extract(tmp_path, pa.table({"prompt": ["a", "b"]}))
    assert [(row["row_index"], row["request_id"], row["prompt"]) for row in rows] == [(0, "0", "a"), (1, "1", "b")]


@pytest.mark.parametrize("ids", [pa.array([7, 5]), pa.array(["7", "5"]), pa.array(["7", "5"]).dictionary_encode()])
def test_ids_from_a_column(tmp_path: Path, ids: pa.Array) -> None:
    rows = extract(tmp_path, pa.table({"key": ids, "prompt": ["a", "b"]}), id_column="key")
    assert [row["request_id"] for row in rows] == ["7", "5"]


def test_column_request_id_is_taken_unasked(tmp_path: Path) -> None:
    assert extract(tmp_path, pa.table({"request_id": ["x"], "prompt": ["a"]}))[0]["request_id"] == "x"


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ({"id": ["a", "a"], "prompt": ["x", "y"]}, {"id_column": "id"}, r"not unique: 'a' \(rows 0 and 1\)"),
        ({"id": ["a", None], "prompt": ["x", "y"]}, {"id_column": "id"}, "'id' is null in row 1"),
        ({"id": [0.5], "prompt": ["x"]}, {"id_column": "id"}, "has type double, expected text or integers"),
        ({"prompt": ["x"]}, {"id_column": "id"}, "no column 'id' to take the id from. Its columns are: prompt"),
        ({"text": ["x"]}, {}, "none of the columns prompt_token_ids, messages, prompt"),
        ({"text": ["x"]}, {"prompt_column": "body"}, "no column 'body' to take the prompt from"),
        ({"prompt": [3]}, {}, "'prompt' has type int64"),
        ({"prompt": ["x"], "completion": ["y"]}, {}, "completion have names that the output needs"),
        ({"prompt": ["x"], "max_tokens": ["many"]}, {}, "'max_tokens' has type string, expected integers"),
        ({"a": ["x"]}, {"template": "{{ b }}"}, "no column 'b' to take the template's value from"),
    ],
)
def test_unusable_columns_stop_the_job(
    tmp_path: Path, table: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        extract(tmp_path, pa.table(table), **options)


def test_repeated_ids_stop_every_attempt_at_the_job(tmp_path: Path, tiny_model: Path) -> None:
    pq.write_table(pa.table({"id": ["a", "b", "a"], "prompt": ["x", "y", "z"]}), tmp_path / "input.parquet")
    options = {"input": str(tmp_path / "input.parquet"), "output": str(tmp_path / "job"), "model": str(tiny_model)}
    spec = load_job(None, {**options, "id_column": "id", "max_tokens": 1})
    for _attempt in range(2):
        with pytest.raises(InputError, match="not unique"):
            job.run(spec)
    assert not (tmp_path / "job" / "_SUCCESS").exists()


def test_an_output_folder_inside_the_input_folder(tmp_path: Path, tiny_model: Path) -> None:
    pq.write_table(pa.table({"prompt": ["x", "y"]}), tmp_path / "input.parquet")
    spec = load_job(None, {"input": str(tmp_path), "output": str(tmp_path / "job"), "model": str(tiny_model)})
    for _attempt in range(2):
        assert job.extract(spec)["num_rows"] == 2


@pytest.mark.parametrize(
    ("template", "message"),
    [("hello", "names no column"), ("{{ a", "can't be parsed"), ("{{ my column }}", "whose name is not one word")],
)
def test_bad_templates_stop_the_job(tmp_path: Path, template: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        extract(tmp_path, pa.table({"a": ["x"]}), template=template)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([None], pa.string()), "the prompt is null"),
        (pa.nulls(1), "the prompt is null"),
        (pa.array([""]), "the prompt is empty"),
        (pa.array([" \n"]), "the prompt is empty"),
        (
            pa.array([NOT_UTF8]),
            "no UTF-8 text: invalid continuation byte at byte 3|no UTF-8 text: unexpected end of data",
        ),
        (pa.array([NOT_UTF8]).view(pa.string()), "no UTF-8 text"),
        (pa.array([None], pa.list_(pa.int32())), "the prompt is null"),
        (pa.array([[]], pa.list_(pa.int32())), "the prompt is empty"),
        (pa.array([[1, None]], pa.list_(pa.int32())), r"prompt_token_ids\[1\] is None"),
        (pa.array([[1, -1]], pa.list_(pa.int64())), r"prompt_token_ids\[1\] is -1"),
        (pa.array([[{"role": "user", "content": None}]]), r"messages\[0\] has no text in 'content'"),
        (pa.array([[{"content": "x"}]]), r"messages\[0\] has no text in 'role'"),
    ],
)
def test_a_bad_row_gets_its_reason_and_the_next_row_runs(tmp_path: Path, column: pa.Array, message: str) -> None:
    table = pa.table({"prompt": column})
    error = extract(tmp_path, table)[0]["error"]
    assert error is not None
    assert re.search(message, error)


@pytest.mark.parametrize(
    ("column", "kind", "expected"),
    [
        (pa.array(["x"]), "prompt", "x"),
        (pa.array(["x"], pa.large_string()), "prompt", "x"),
        (pa.array(["x"]).dictionary_encode(), "prompt", "x"),
        (pa.array(["ü".encode()]), "prompt", "ü"),
        (pa.array(["ü".encode()], pa.binary(2)), "prompt", "ü"),
        (pa.array([[1, 2]], pa.list_(pa.int64())), "prompt_token_ids", [1, 2]),
        (pa.array([[{"role": "user", "content": "x"}]]), "messages", [{"role": "user", "content": "x"}]),
    ],
)
def test_every_kind_of_prompt(tmp_path: Path, column: pa.Array, kind: str, expected: object) -> None:
    assert extract(tmp_path, pa.table({"ask": column}), prompt_column="ask")[0][kind] == expected


def test_a_template_sees_the_columns_that_it_names(tmp_path: Path) -> None:
    table = pa.table({"a": ["x", None, "z"], "n": [1, 2, 3], "unused": [None, None, None]})
    rows = extract(tmp_path, table, template="{{ a }}-{{ n + 1 }}")
    assert [row["prompt"] for row in rows] == ["x-2", None, "z-4"]
    assert rows[1]["error"] == "column 'a', which the template names, is null"


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary(2), pa.binary_view(), "dictionary"])
def test_a_template_sees_bytes_as_text(tmp_path: Path, kind: pa.DataType | str) -> None:
    values = ["ü".encode(), None, b"\xff\xff"]
    column = pa.array(values).dictionary_encode() if kind == "dictionary" else pa.array(values, pa.binary(2)).cast(kind)
    rows = extract(tmp_path, pa.table({"a": column}), template="{{ a }}!")
    assert [row["prompt"] for row in rows] == ["ü!", None, None]
    assert "no UTF-8" in rows[2]["error"]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, 1000], pa.timestamp("ns")),
        pa.array([2**55, 0], pa.timestamp("ms")),
        pa.array([[NOT_UTF8], [b"x"]]).view(pa.list_(pa.string())),
        pa.array([[None], ["x"]], pa.list_(pa.string())),
    ],
    ids=["nanoseconds", "year 1143707", "no UTF-8", "null"],
)
def test_a_value_that_a_template_can_not_write_fails_its_row_alone(tmp_path: Path, column: pa.Array) -> None:
    rows = extract(tmp_path, pa.table({"a": column}), template="{{ a[0] if a is sequence else a }}!")
    assert "template" in rows[0]["error"] and rows[1]["error"] is None


def test_messages_that_are_no_text_fail_their_row_alone(tmp_path: Path) -> None:
    content = pa.array([b"x", NOT_UTF8]).view(pa.string())
    messages = pa.StructArray.from_arrays([pa.array(["user", "user"]), content], ["role", "content"])
    rows = extract(tmp_path, pa.table({"messages": pa.ListArray.from_arrays([0, 1, 2], messages)}))
    assert rows[0]["messages"] == [{"role": "user", "content": "x"}]
    assert "the prompt can't be read: 'utf-8' codec can't decode" in rows[1]["error"]


def test_long_rows_are_read_and_written_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blendserve.input_files.FEW_ROWS", 2)
    monkeypatch.setattr("blendserve.row_groups._MAX_ROWS", 6)
    monkeypatch.setattr("blendserve.row_groups._MAX_BYTES", 2000)
    rows = extract(tmp_path, pa.table({"n": list(range(15))}), template="x" * 600 + "{{ n }}")
    assert [row["prompt"] for row in rows] == ["x" * 600 + str(n) for n in range(15)]
    for name, expected in (("input_rows", [6, 6, 3]), ("requests", [4, 4, 4, 3])):
        metadata = pq.read_metadata(JobFolder(tmp_path / "job").relation(name))
        assert [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)] == expected


def test_a_template_that_fails_fails_its_row(tmp_path: Path) -> None:
    rows = extract(tmp_path, pa.table({"n": [0, 2]}), template="{{ 4 // n }}")
    assert "ZeroDivisionError" in rows[0]["error"]
    assert rows[1]["prompt"] == "2"


def test_a_template_can_not_leave_its_sandbox(tmp_path: Path) -> None:
    rows = extract(tmp_path, pa.table({"a": ["x"]}), template="{{ a.__class__.__mro__ }}")
    assert "SecurityError" in rows[0]["error"]


def test_own_limits_and_hints(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a"] * 4, "max_tokens": [5, None, 0, 2**40], "output_tokens_hint": [0, None, 3, -4]})
    rows = extract(tmp_path, table)
    assert [row["max_tokens"] for row in rows] == [5, None, 1, 2**31 - 1]
    assert [row["output_tokens_hint"] for row in rows] == [1, None, 3, 1]
    assert rows[2]["error"] == "max_tokens is 0, expected >= 1"


def test_all_errors_end_a_command_with_status_two(tmp_path: Path) -> None:
    with pytest.raises(BlendServeError) as caught:
        extract(tmp_path, pa.table({"text": ["x"]}))
    assert caught.value.exit_status == 2
