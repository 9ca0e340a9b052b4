"""Results: every input row exactly once, whatever became of it, and counts that add up."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blendserve.errors import InUseError, ReconciliationError
from blendserve.job_folder import JobFolder
from blendserve.merge import MergedResults, _rechunk, merge_results
from blendserve.schemas import COMPLETIONS, REJECTED_REQUESTS, REQUESTS, SORTED_REQUESTS, TOKENIZED_REQUESTS

OUTCOMES = ("succeeded", "failed", "rejected", "duplicate", "missing")


def completion(row_index: int, *, is_failed: bool = False) -> dict[str, object]:
    return {
        "row_index": row_index,
        "request_id": f"r{row_index}",
        "completion": None if is_failed else f"text {row_index}",
        "completion_token_ids": [] if is_failed else [1, 2],
        "finish_reason": "error" if is_failed else "stop",
        "error": "it broke" if is_failed else None,
        "num_prompt_tokens": 10,
        "num_cached_tokens": 4,
        "num_completion_tokens": 0 if is_failed else 2,
    }


def tokenized(row_index: int) -> dict[str, object]:
    return {
        "row_index": row_index,
        "request_id": f"r{row_index}",
        "prompt_token_ids": [5] * 10,
        "num_prompt_tokens": 10,
        "max_tokens": 4,
    }


def lay_out(folder: JobFolder, outcomes: list[str]) -> None:
    """A job's folder in which row 0 succeeded and row i + 1 came to outcomes[i]; duplicates are of row 0."""
    outcomes = ["succeeded", *outcomes]
    indices = range(len(outcomes))
    folder.work.mkdir(parents=True)
    pq.write_table(pa.table({"n": list(indices)}), folder.relation("input_rows"))
    requests = [{"row_index": index, "request_id": f"r{index}", "prompt": "x"} for index in indices]
    rejected = [
        {"row_index": index, "request_id": f"r{index}", "error": "no prompt"}
        for index in indices
        if outcomes[index] == "rejected"
    ]
    order = [
        {
            "sort_position": index,
            "row_index": index,
            "num_prompt_tokens": 10,
            "shared_prefix_tokens": 0,
            "duplicate_of": 0 if outcomes[index] == "duplicate" else None,
        }
        for index in indices
        if outcomes[index] != "rejected"
    ]
    for name, rows, schema in (
        ("requests", requests, REQUESTS),
        ("rejected_requests", rejected, REJECTED_REQUESTS),
        ("sorted_requests", order, SORTED_REQUESTS),
        ("tokenized_requests", [tokenized(row["row_index"]) for row in order], TOKENIZED_REQUESTS),
    ):
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder.relation(name))
    done = [
        completion(index, is_failed=outcomes[index] == "failed")
        for index in indices
        if outcomes[index] in ("succeeded", "failed")
    ]
    write_part(folder, "shard-00000", done[::-1])


def write_part(folder: JobFolder, shard: str, rows: list[dict[str, object]]) -> None:
    path = folder.completions / shard / "part-00000.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=COMPLETIONS), path)


def publish(
    folder: JobFolder, *, allow_missing: bool = True, check_lease: Callable[[], object] = lambda: None
) -> MergedResults:
    return merge_results(folder, allow_missing=allow_missing, check_lease=check_lease)


def merge(folder: JobFolder) -> tuple[MergedResults, list[dict[str, object]]]:
    merged = publish(folder)
    return merged, pq.read_table(folder.results).to_pylist()


@settings(deadline=None, max_examples=25)
@given(st.lists(st.sampled_from(OUTCOMES), max_size=30))
def test_every_row_comes_out_once_and_counts_add_up(outcomes: list[str]) -> None:
    with TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr("blendserve.merge.FEW_ROWS", 4)
        patch.setattr("blendserve.merge._ROWS_PER_FILE", 8)
        folder = JobFolder(Path(root) / "job")
        lay_out(folder, outcomes)
        merged, rows = merge(folder)
        num_rows = [pq.read_metadata(path).num_rows for path in sorted(folder.results.iterdir())]
    assert [row["n"] for row in rows] == list(range(len(outcomes) + 1))
    texts = {"succeeded": "text {}", "duplicate": "text 0"}
    assert [row["completion"] for row in rows] == [
        texts[outcome].format(index) if outcome in texts else None
        for index, outcome in enumerate(["succeeded", *outcomes])
    ]
    assert num_rows[:-1] == [8] * (len(outcomes) // 8) and 1 <= num_rows[-1] <= 8
    counts = dict(merged.counts)
    assert counts.pop("input_rows") == len(outcomes) + 1 == sum(counts.values())
    assert counts["duplicates_resolved"] == outcomes.count("duplicate")
    assert counts["rejected"] == outcomes.count("rejected")


@given(st.lists(st.integers(0, 9)), st.integers(1, 8))
def test_rows_keep_their_order_in_tables_of_one_size(sizes: list[int], num_rows: int) -> None:
    numbers = iter(range(sum(sizes)))
    batches = [pa.record_batch({"n": pa.array(list(islice(numbers, size)), pa.int64())}) for size in sizes]
    tables = list(_rechunk(iter(batches), num_rows))
    assert [number for table in tables for number in table["n"].to_pylist()] == list(range(sum(sizes)))
    assert all(table.num_rows == num_rows for table in tables[:-1])


def test_what_each_outcome_looks_like(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    lay_out(folder, ["failed", "rejected", "duplicate", "missing"])
    merged, rows = merge(folder)
    assert list(rows[0])[:2] == ["n", "request_id"]
    shown = [(row["finish_reason"], row["completion"], row["error"], row["num_cached_tokens"]) for row in rows]
    assert shown == [
        ("stop", "text 0", None, 4),
        ("error", None, "it broke", 4),
        ("rejected", None, "no prompt", None),
        ("stop", "text 0", None, 10),
        ("error", None, "the shard of this request did not finish", None),
    ]
    assert merged.tokens == {"num_prompt_tokens": 30, "num_cached_tokens": 18, "num_completion_tokens": 4}


def test_missing_rows_stop_a_strict_merge_and_nothing_is_published(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    lay_out(folder, ["missing"])
    with pytest.raises(ReconciliationError, match=r"1 of 2 requests .* have no completion"):
        publish(folder, allow_missing=False)
    assert not folder.results.exists()


def test_a_merge_that_lost_its_lease_publishes_nothing(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    lay_out(folder, [])

    def fail() -> None:
        raise InUseError("taken over")

    with pytest.raises(InUseError):
        publish(folder, check_lease=fail)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["completions", "work"]


def test_two_merges_at_a_time_leave_whole_results(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    lay_out(folder, ["failed"] * 3)
    with suppress(OSError):
        publish(folder, check_lease=lambda: publish(folder))
    assert pq.read_table(folder.results)["n"].to_pylist() == [0, 1, 2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["completions", "results", "work"]


def test_results_are_on_the_disk_before_they_have_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = JobFolder(tmp_path)
    lay_out(folder, [])
    synced: list[str] = []
    monkeypatch.setattr("os.fsync", lambda file: synced.append(str(Path(f"/proc/self/fd/{file}").readlink())))
    publish(folder)
    names = [re.sub(r"\.results\.\w+\.tmp", "building", name.removeprefix(str(tmp_path))) for name in synced]
    assert names == ["/building/part-00000.parquet", "/building", ""]


def test_a_later_success_beats_an_earlier_failure(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    lay_out(folder, ["failed"])
    write_part(folder, "shard-00001", [completion(1)])
    merged, rows = merge(folder)
    assert rows[1]["completion"] == "text 1"
    assert merged.counts["failed"] == 0


def test_what_the_sample_cut_off_is_no_result(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    lay_out(folder, ["missing", "missing"])
    cut_off = [{**completion(row), "finish_reason": "length", "completion": "cut off"} for row in (1, 2)]
    write_part(folder, "sample", cut_off)
    write_part(folder, "shard-00001", [{**completion(1), "num_completion_tokens": 3}])
    merged, rows = merge(folder)
    assert [row["completion"] for row in rows] == ["text 0", "text 1", None]
    assert merged.counts["missing"] == 1


def test_without_a_single_completion(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    lay_out(folder, ["rejected"])
    (folder.completions / "shard-00000" / "part-00000.parquet").unlink()
    merged, _ = merge(folder)
    assert merged.counts["missing"] == 1


@pytest.mark.parametrize(("outcome", "ids"), [("succeeded", ["r0", "r7"]), ("duplicate", ["r7", "r1"])])
def test_completions_of_other_requests_are_noticed(tmp_path: Path, outcome: str, ids: list[str]) -> None:
    folder = JobFolder(tmp_path)
    lay_out(folder, [outcome])
    requests = pq.read_table(folder.relation("requests"))
    pq.write_table(requests.set_column(1, REQUESTS.field("request_id"), pa.array(ids)), folder.relation("requests"))
    with pytest.raises(ReconciliationError, match=r"row \d in .*, request 'r7', is of a request with another id"):
        publish(folder)


def test_a_damaged_relation_is_noticed(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    lay_out(folder, ["succeeded"])
    pq.write_table(pa.table({"n": [0, 1, 2]}), folder.relation("input_rows"))
    with pytest.raises(ReconciliationError):
        publish(folder)
