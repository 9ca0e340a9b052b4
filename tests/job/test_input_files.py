"""Which files an input names, in which order their rows count, and how damaged ones are refused."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blendserve.errors import InputError
from blendserve.input_files import open_input


def write(path: Path, **columns: list[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def prompts(stated: str, limit: int | None = None) -> list[str]:
    return [text for batch in open_input(stated).batches(limit) for text in batch.column("prompt").to_pylist()]


def test_a_folder_is_read_in_name_order_without_hidden_files(tmp_path: Path) -> None:
    write(tmp_path / "b.parquet", prompt=["third"])
    write(tmp_path / "a" / "x.parquet", prompt=["first", "second"])
    write(tmp_path / "_temporary" / "y.parquet", prompt=["no"])
    write(tmp_path / ".z.parquet", prompt=["no"])
    (tmp_path / "notes.txt").write_text("no")
    assert prompts(str(tmp_path)) == ["first", "second", "third"]


def test_a_glob_takes_what_it_matches(tmp_path: Path) -> None:
    for number in (2, 10, 1):
        write(tmp_path / f"part-{number:02d}.parquet", prompt=[str(number)])
    write(tmp_path / "other.parquet", prompt=["no"])
    assert prompts(str(tmp_path / "part-*.parquet")) == ["1", "2", "10"]


def test_limit_takes_the_first_rows_across_files(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", prompt=["1", "2"])
    write(tmp_path / "b.parquet", prompt=["3", "4"])
    assert prompts(str(tmp_path), limit=3) == ["1", "2", "3"]


def test_partition_folders_become_columns(tmp_path: Path) -> None:
    write(tmp_path / "day=1" / "a.parquet", prompt=["x"])
    write(tmp_path / "day=2" / "a.parquet", prompt=["y"])
    write(tmp_path / "a.parquet", prompt=["w"])
    rows = [row for batch in open_input(str(tmp_path)).batches(None) for row in batch.to_pylist()]
    assert rows == [{"prompt": "w", "day": None}, {"prompt": "x", "day": 1}, {"prompt": "y", "day": 2}]


@pytest.mark.parametrize("stated", ["max_tokens=2/day=1/a.parquet", "max_tokens=2", "max_tokens=2/day=*/a.parquet"])
def test_only_folders_below_what_is_stated_become_columns(tmp_path: Path, stated: str) -> None:
    write(tmp_path / "max_tokens=2" / "day=1" / "a.parquet", prompt=["x"], max_tokens=[8])
    rows = [row for batch in open_input(str(tmp_path / stated)).batches(None) for row in batch.to_pylist()]
    assert rows == [{"prompt": "x", "max_tokens": 8} | ({} if stated.endswith("1/a.parquet") else {"day": 1})]


@pytest.mark.parametrize("value", [1, "1", None])
def test_a_partition_that_is_a_column_too_is_refused(tmp_path: Path, value: object) -> None:
    write(tmp_path / "day=1" / "a.parquet", prompt=["x"], day=[value])
    with pytest.raises(InputError, match=r"Column 'day' is in the input file .*a\.parquet and .* day=1"):
        open_input(str(tmp_path))


def test_a_column_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    table = pa.table([pa.array(["x"]), pa.array(["y"])], names=["prompt", "prompt"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet has more than one column called prompt"):
        open_input(str(tmp_path))


def test_a_name_with_pattern_characters_is_taken_as_it_is(tmp_path: Path) -> None:
    write(tmp_path / "run[1]" / "a[1].parquet", prompt=["this"])
    write(tmp_path / "run1" / "a1.parquet", prompt=["no"])
    assert prompts(str(tmp_path / "run[1]")) == prompts(str(tmp_path / "run[1]" / "a[1].parquet")) == ["this"]


@pytest.mark.parametrize("stated", ["", "*/*.parquet", "**/*.parquet"])
def test_the_output_is_no_input(tmp_path: Path, stated: str) -> None:
    write(tmp_path / "a" / "x.parquet", prompt=["x"])
    write(tmp_path / "out" / "part-00000.parquet", prompt=["no"])
    write(tmp_path / "out2" / "y.parquet", prompt=["y"])
    names = open_input(str(tmp_path / stated), output=str(tmp_path / "out")).paths
    assert [Path(name).name for name in names] == ["x.parquet", "y.parquet"]


def test_an_input_that_lies_in_the_output_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", prompt=["x"])
    with pytest.raises(InputError, match=f"no Parquet file but such as lie in the output folder {tmp_path}, "):
        open_input(str(path), output=str(tmp_path))


def test_digest_follows_partitions(tmp_path: Path) -> None:
    first = open_input(str(write(tmp_path / "day=1" / "a.parquet", prompt=["x"]).parents[1])).digest()
    (tmp_path / "day=1" / "a.parquet").rename(tmp_path / "day=1" / "b.parquet")
    assert open_input(str(tmp_path)).digest() == first
    (tmp_path / "day=1").rename(tmp_path / "day=2")
    assert open_input(str(tmp_path)).digest() != first


def test_digest_follows_contents_not_names(tmp_path: Path) -> None:
    first = write(tmp_path / "a.parquet", prompt=["x"])
    moved = write(tmp_path / "b.parquet", prompt=["x"])
    changed = write(tmp_path / "c.parquet", prompt=["y"])
    digests = [open_input(str(path)).digest() for path in (first, moved, changed)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("name", ["nowhere.parquet", "*.parquet", "empty"])
def test_nothing_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="names no Parquet file"):
        open_input(str(tmp_path / name))


def test_unknown_protocol() -> None:
    with pytest.raises(InputError, match="can't be reached"):
        open_input("carrierpigeon://bucket/x.parquet")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"id,prompt\n1,hello\n" * 20])
def test_no_parquet(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.parquet is no readable Parquet file"):
        open_input(str(path))


def test_truncated_file(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", prompt=["hello"] * 1000)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(InputError, match="no readable Parquet file"):
        open_input(str(path))


def test_damaged_pages_are_found_when_read(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", prompt=[f"{number} hello" for number in range(5000)])
    content = bytearray(path.read_bytes())
    content[10:2000] = b"\xff" * 1990
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        prompts(str(path))


def test_zero_rows(tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", prompt=pa.array([], pa.string()))
    with pytest.raises(InputError, match="has no rows"):
        open_input(str(tmp_path))


def test_files_may_differ_in_what_may_be_null(tmp_path: Path) -> None:
    never_null = pa.schema([pa.field("prompt", pa.string(), nullable=False)])
    pq.write_table(pa.table({"prompt": ["x"]}, schema=never_null), tmp_path / "a.parquet")
    write(tmp_path / "b.parquet", prompt=["y", None])
    assert prompts(str(tmp_path)) == ["x", "y", None]
    assert open_input(str(tmp_path / "a.parquet")).schema.equals(never_null)


def test_files_that_differ_in_columns(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", prompt=["x"])
    write(tmp_path / "b.parquet", prompt=[1])
    with pytest.raises(
        InputError, match=r"differ in their columns: .*a\.parquet has \[prompt: string\].*prompt: int64"
    ):
        open_input(str(tmp_path))
