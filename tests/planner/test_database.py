"""The planner's DuckDB: bounded memory that spills and leaves nothing, bound values, relations written whole."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blendserve.planner import database
from blendserve.planner.database import compute, default_memory_bytes, open_database, write_relation
from blendserve.schemas import OUTPUT_LENGTH_ESTIMATES


def test_a_sort_larger_than_its_memory_spills_and_cleans_up(tmp_path):
    random = np.random.default_rng(0)
    num_rows, num_tokens = 60_000, 100
    offsets = pa.array(np.arange(num_rows + 1, dtype=np.int32) * num_tokens)
    tokens = random.integers(0, 1000, num_rows * num_tokens, dtype=np.int32)
    path = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({"prompt_token_ids": pa.ListArray.from_arrays(offsets, pa.array(tokens))}), path)
    with open_database(tmp_path / "spill", memory_bytes=48 * 2**20) as connection:
        query = "select * from read_parquet($path) order by prompt_token_ids"
        table = connection.sql(query, params={"path": str(path)}).to_arrow_table()
    rows = table.column("prompt_token_ids").combine_chunks().flatten().to_numpy().reshape(num_rows, num_tokens)
    expected = np.lexsort(tokens.reshape(num_rows, num_tokens).T[::-1])
    assert np.array_equal(rows, tokens.reshape(num_rows, num_tokens)[expected])
    assert list((tmp_path / "spill").iterdir()) == []


@pytest.mark.parametrize(
    "folder",
    ["it's; drop table x --", '"b"', "run[1]", "run?", "run*", "**", "request_id=q", "row_index=0/run[1]", "a\\b"],
)
def test_paths_are_taken_as_they_are(tmp_path, folder):
    path = tmp_path / folder / "requests.parquet"
    for place in (path, tmp_path / "run1" / "requests.parquet"):  # which most of the patterns match too
        place.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"request_id": ["b", "b"], "row_index": [0, 1]}), tmp_path / "run1" / "requests.parquet")
    pq.write_table(pa.table({"request_id": ["a", "b", "a"], "row_index": [0, 1, 2]}), path)
    with open_database(tmp_path / "spill") as connection:
        table = compute(connection, "duplicate_request_ids", files={"requests": [path]})
    assert table.column("request_id").to_pylist() == ["a"]


def test_a_relation_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "output_length_estimates.parquet"
    good = pa.table({"source": ["hint"], "row_index": [1], "estimated_output_tokens": [3]})
    write_relation(path, good, OUTPUT_LENGTH_ESTIMATES)
    assert pq.read_schema(path).equals(OUTPUT_LENGTH_ESTIMATES)
    with pytest.raises(pa.ArrowInvalid):
        write_relation(path, pa.table({**good.to_pydict(), "row_index": ["many"]}), OUTPUT_LENGTH_ESTIMATES)
    assert pq.read_table(path).to_pylist() == [{"row_index": 1, "estimated_output_tokens": 3, "source": "hint"}]
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_the_default_limit_is_at_most_three_gigabytes():
    assert 0 < default_memory_bytes() <= 3 * 2**30


def test_the_limit_of_its_own_control_group_counts(tmp_path, monkeypatch):
    own = tmp_path / "own"
    own.write_text("9:name=systemd:/x\n4:cpu,memory:/jobs/one\n0::/jobs/two\n")
    monkeypatch.setattr(database, "_OWN_CGROUPS", own)
    monkeypatch.setattr(database, "_CGROUPS", tmp_path)
    for place, limit in (("memory/jobs/one/memory.limit_in_bytes", "400000000"), ("jobs/two/memory.max", "max")):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_text(f"{limit}\n")
    assert default_memory_bytes() == 200_000_000
