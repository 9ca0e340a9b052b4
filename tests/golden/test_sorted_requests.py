"""`split_groups`, `sorted_requests`, `completed_requests` on small tables."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.golden.relations import rows_of


def test_groups_are_sorted_by_branches_then_next_tokens_the_shorter_prompt_first(tmp_path):
    end = -(2**31)
    unsettled = {
        "place": [0, 1, 2, 3, 4, 5, 6, 7],
        "group_number": [0, 0, 0, 1, 1, 1, 1, 1],
        "branch": [5, 5, 5, 5, 5, 5, 5, 4],
        "token_0": [9, 2, 2, 7, 7, 7, 7, 9],
        "token_1": [1, 5, 3, 7, 7, end, 7, 1],
        "token_2": [1, 0, 9, 1, 1, end, 1, 1],
        "token_3": [1, 0, 9, end, end, end, end, 1],
        "num_tokens_left": [8, 6, 4, 4, 3, 1, 3, 9],
    }
    rows = rows_of(tmp_path, "split_groups", {"unsettled": unsettled})
    assert [row["place"] for row in rows] == [2, 1, 0, 7, 5, 4, 6, 3]


@pytest.mark.parametrize(("dedupe", "expected"), [(True, [None, 4, None, None, None, 6]), (False, [None] * 6)])
def test_duplicates_have_equal_prompts_and_equal_limits(tmp_path, dedupe, expected):
    neighbours = {
        "sort_position": [0, 1, 2, 3, 4, 5],
        "row_index": [4, 9, 11, 5, 6, 8],
        "num_prompt_tokens": [3, 3, 3, 4, 2, 2],
        "max_tokens": [1, 1, 2, 1, 1, 1],
        "shared_prefix_tokens": [0, 3, 3, 3, 0, 2],
    }
    rows = rows_of(tmp_path, "sorted_requests", {"neighbours": neighbours}, dedupe=dedupe)
    assert [row["duplicate_of"] for row in rows] == expected
    assert [row["sort_position"] for row in rows] == list(range(6))


def test_failed_completions_do_not_count_repeated_ones_once_and_cut_off_ones_are_not_final(tmp_path):
    limits = {"row_index": [1, 2, 4, 5, 6], "max_tokens": [9, 9, 9, 9, 9]}
    pq.write_table(pa.table(limits), tmp_path / "tokenized.parquet")
    for name, columns in {
        "part-0": {"row_index": [1, 2], "finish_reason": ["stop", "error"], "num_completion_tokens": [3, 0]},
        "part-1": {"row_index": [1, 4], "finish_reason": ["stop", "length"], "num_completion_tokens": [3, 9]},
        "sample": {"row_index": [5, 6], "finish_reason": ["length", "length"], "num_completion_tokens": [4, 4]},
        "after": {"row_index": [5], "finish_reason": ["stop"], "num_completion_tokens": [7]},
    }.items():
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    parts = [tmp_path / f"{name}.parquet" for name in ("part-0", "part-1", "sample", "after")]
    files = {"completions": parts, "tokenized_requests": [tmp_path / "tokenized.parquet"]}
    rows = rows_of(tmp_path, "completed_requests", {}, files)
    assert sorted(tuple(row.values()) for row in rows) == [
        (1, "stop", 3, True),
        (4, "length", 9, True),
        (5, "stop", 7, True),  # cut off by the sample's limit, then finished
        (6, "length", 4, False),  # has to go on
    ]
