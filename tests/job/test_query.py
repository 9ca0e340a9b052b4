"""Queries over the input: what they make of the rows, and that they reach nothing else."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blendserve import job
from blendserve.errors import InputError, StoreUnreachableError, UsageError
from blendserve.input_files import InputFiles, open_input
from blendserve.query import queried
from blendserve.spec import JobSpec


@pytest.fixture
def files(tmp_path: Path) -> InputFiles:
    (tmp_path / "in").mkdir()
    for day in (1, 2):
        folder = tmp_path / "in" / f"day={day}"
        folder.mkdir()
        pq.write_table(pa.table({"n": [3 * day, day], "body": [f"b{day}", None]}), folder / "x.parquet")
    (tmp_path / "secret.csv").write_text("password\nhunter2\n")
    return open_input(str(tmp_path / "in"))


def rows(files: InputFiles, sql: str, limit: int | None = None) -> list[dict[str, Any]]:
    return [row for batch in queried(files, sql).batches(limit) for row in batch.to_pylist()]


def test_query_makes_the_rows(files: InputFiles) -> None:
    made = rows(files, "select n + day as total, upper(body) as prompt from input where body is not null order by n")
    assert made == [{"total": 4, "prompt": "B1"}, {"total": 8, "prompt": "B2"}]


def test_rows_keep_their_order_and_limit(files: InputFiles) -> None:
    assert [row["n"] for row in rows(files, "from input")] == [3, 1, 6, 2]
    assert [row["n"] for row in rows(files, "from input", limit=3)] == [3, 1, 6]


def test_column_made_twice_gets_a_number(files: InputFiles) -> None:
    assert rows(files, "select n, n from input limit 1") == [{"n": 3, "n_1": 3}]


@pytest.mark.parametrize(
    "sql",
    [
        "select * from read_csv('{folder}/secret.csv')",
        "select * from '{folder}/secret.csv'",
        "select * from read_text('/proc/self/environ')",
        "select * from read_parquet('{folder}/in/day=1/x.parquet')",
        "select * from glob('{folder}/*')",
        "select * from sniff_csv('{folder}/secret.csv')",
        "select * from query('select * from read_csv(''{folder}/secret.csv'')')",
        "select * from query_table('{folder}/secret.csv')",
        "select * from 's3://bucket/x.parquet'",
        "select * from read_json('http://localhost/x')",
        "select getenv('HOME')",
        "select * from hidden",
        "select 1; copy input to '{folder}/out.csv'",
        "copy input to '{folder}/out.csv'",
        "attach '{folder}/new.db'",
        "install httpfs",
        "load httpfs",
        "set enable_external_access = true",
        "pragma enable_profiling",
        "create table other as select 1",
        "delete from input",
        "selec n from input",
        "",
    ],
)
def test_query_reaches_nothing_but_the_input(files: InputFiles, tmp_path: Path, sql: str) -> None:
    hidden = pa.table({"a": [1]})  # a variable of the caller, which DuckDB would find by its name
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match="Option 'sql'"):
        rows(files, sql.replace("{folder}", str(tmp_path)))
    assert sorted(tmp_path.rglob("*")) == before and hidden.num_rows == 1


def test_query_that_fails_on_a_row_or_makes_none_is_named(files: InputFiles) -> None:
    with pytest.raises(UsageError, match="the query fails: Conversion Error"):
        rows(files, "select cast(body as integer) as n from input")
    with pytest.raises(InputError, match="no rows of 4 input rows"):
        rows(files, "select * from input where n > 100")


@pytest.mark.parametrize(
    "made", ["interval 1 day", "union_value(a := 1)", "{'a': interval 1 day}"], ids=["interval", "union", "struct"]
)
def test_types_that_parquet_can_not_hold_are_refused_before_the_job(files: InputFiles, made: str) -> None:
    with pytest.raises(UsageError, match=r"makes a column 'made' of type .*, which Parquet can't hold"):
        queried(files, f"select n, {made} as made from input")


def test_a_column_that_duckdb_can_not_read_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "half": pa.array([1.5], pa.float16())}), tmp_path / "x.parquet")
    with pytest.raises(UsageError, match=r"Option 'sql': the input can't be queried: .*half: halffloat"):
        queried(open_input(str(tmp_path)), "select prompt from input")


def test_a_damaged_file_is_not_the_querys_fault(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"prompt": [f"{number} hello" for number in range(5000)]}), path)
    content = bytearray(path.read_bytes())
    content[10:2000] = b"\xff" * 1990
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        rows(open_input(str(path)), "select upper(prompt) as prompt from input")


def test_what_fails_after_the_first_rows_is_told_like_what_fails_at_once(tmp_path: Path) -> None:
    names = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for name in names:
        numbers = range(20_000)
        pq.write_table(pa.table({"n": [str(number) for number in numbers[:-1]] + ["x"]}), name, row_group_size=1000)
    opened = open_input(str(tmp_path))
    with pytest.raises(UsageError, match=r"the query fails: Conversion Error: Could not convert string 'x' [^\n]*$"):
        rows(opened, "select cast(n as integer) as n from input")
    content = bytearray(names[1].read_bytes())
    content[10:2000] = b"\xff" * 1990
    names[1].write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        rows(opened, "select upper(n) as prompt from input")


def test_a_store_that_stops_answering_in_mid_query_is_not_the_querys_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    store = fsspec.filesystem("memory")
    for number in range(3):
        with store.open(f"/stored/{number}.parquet", "wb") as file:
            pq.write_table(pa.table({"n": range(1000)}), file)
    files, readers, open_file = open_input("memory://stored"), [], store._open

    def opened(_store: object, path: str, *arguments: Any, **options: Any) -> Any:
        readers.append(threading.get_ident())
        if path == files.paths[2]:
            raise ConnectionError("no route to the store")
        return open_file(path, *arguments, **options)

    monkeypatch.setattr(type(store), "_open", opened)
    with pytest.raises(StoreUnreachableError, match="memory://stored doesn't answer: no route to the store"):
        rows(files, "select n + 1 as n from input")
    # A thread that still reads from a store at the process's end would abort it.
    assert duckdb.__version__.startswith("1.") or set(readers) == {threading.get_ident()}


def test_job_runs_on_what_its_query_makes(files: InputFiles, tiny_model: Path, tmp_path: Path) -> None:
    options = {"input": str(tmp_path / "in"), "output": str(tmp_path / "out"), "model": str(tiny_model)}
    spec = JobSpec(**options, sql="select body || '?' as prompt, n from input where body is not null")  # type: ignore[arg-type]
    assert job.extract(spec)["num_rows"] == 2
    requests = pq.read_table(tmp_path / "out/work/requests.parquet")
    assert requests["prompt"].to_pylist() == ["b1?", "b2?"]
    assert pq.read_table(tmp_path / "out/work/input_rows.parquet").column_names == ["prompt", "n"]
    with pytest.raises(InputError, match="no column 'day'"):
        job.preflight(spec.model_copy(update={"sql": "select body from input", "template": "{{ day }}"}))
