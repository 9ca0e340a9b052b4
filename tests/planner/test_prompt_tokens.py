"""The flat file of all prompts' tokens: exact rows, and never another file's tokens, however it was left."""

from __future__ import annotations

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blendserve.planner import prompt_tokens
from blendserve.planner.analyze import analyze
from blendserve.planner.plan import make_plan
from blendserve.planner.prompt_tokens import open_prompt_tokens
from tests.planner.jobs import make_spec, scheduled_rows, write_job, write_model

PROMPTS = [[1, 2, 3], [], [4]]


def write_prompts(path, prompts):
    pq.write_table(pa.table({"prompt_token_ids": pa.array(prompts, pa.list_(pa.int32()))}), path)


def read_all(path):
    with open_prompt_tokens(path, path.parent) as tokens:
        return tokens.take(np.arange(len(tokens.lengths))).to_pylist()


@pytest.fixture
def path(tmp_path):
    write_prompts(tmp_path / "p.parquet", PROMPTS)
    assert read_all(tmp_path / "p.parquet") == PROMPTS
    return tmp_path / "p.parquet"


def kept_in(folder):
    (kept,) = (entry for entry in folder.iterdir() if entry.suffix == ".bin")
    return kept


@settings(max_examples=25, deadline=None)
@given(prompts=st.lists(st.lists(st.integers(0, 9), max_size=9), min_size=1, max_size=9), data=st.data())
def test_rows_and_windows_are_those_of_the_parquet_file(tmp_path_factory, prompts, data):
    path = tmp_path_factory.mktemp("prompts") / "p.parquet"
    write_prompts(path, prompts)
    rows = np.array(data.draw(st.lists(st.integers(0, len(prompts) - 1), max_size=20)), dtype=np.int64)
    start = np.array([data.draw(st.integers(0, len(prompts[row]))) for row in rows], dtype=np.int64)
    with open_prompt_tokens(path, path.parent) as tokens:
        assert tokens.take(rows).to_pylist() == [prompts[row] for row in rows]
        windows = tokens.windows(rows, start, 3).tolist()
    beyond = [np.iinfo(np.int32).min] * 3
    assert windows == [(prompts[row][at:] + beyond)[:3] for row, at in zip(rows, start, strict=True)]


def test_the_next_step_reads_the_file_that_is_kept(path, monkeypatch):
    monkeypatch.setattr(prompt_tokens, "_write", None)
    assert read_all(path) == PROMPTS


def test_a_file_of_earlier_prompts_is_made_anew(path):
    seen = path.stat()
    write_prompts(path.with_name("new"), [[1, 2, 9], [], [4]])
    os.utime(path.with_name("new"), ns=(seen.st_atime_ns, seen.st_mtime_ns))
    path.with_name("new").replace(path)
    assert path.stat().st_size == seen.st_size
    assert read_all(path) == [[1, 2, 9], [], [4]]


@pytest.mark.parametrize("kept_bytes", [0, 5, -1])
def test_a_torn_file_is_made_anew(path, kept_bytes):
    kept = kept_in(path.parent)
    size = kept.stat().st_size
    os.truncate(kept, kept_bytes % size)
    assert read_all(path) == PROMPTS
    assert kept.stat().st_size == size


def test_a_file_from_before_the_machine_went_down_is_made_anew(path, monkeypatch):
    kept = kept_in(path.parent)
    kept.write_bytes(bytes(12) + kept.read_bytes()[12:])
    assert read_all(path) != PROMPTS
    monkeypatch.setattr(prompt_tokens.psutil, "boot_time", lambda: 1.0)
    assert read_all(path) == PROMPTS


def test_a_file_that_fails_to_be_written_does_not_stay(path, monkeypatch):
    write_prompts(path, [[7]])

    def fail(*_: object) -> bytes:
        raise OSError("disk full")

    monkeypatch.setattr(prompt_tokens.np, "append", fail)
    with pytest.raises(OSError, match="disk full"):
        read_all(path)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_plan_needs_no_kept_file_and_leaves_none(tmp_path):
    folder = write_job(tmp_path / "job", [[1, 2], [1, 3], [4]])
    model = write_model(tmp_path / "model")
    for is_kept in (True, False):
        analyze(folder, dedupe=True)
        if not is_kept:
            kept_in(folder.work).unlink()
        manifest = make_plan(folder, make_spec(folder), model)
        (rows,) = scheduled_rows(folder, manifest.shards)
        assert sorted(row["prompt_token_ids"] for row in rows) == [[1, 2], [1, 3], [4]]
        assert not [entry for entry in folder.work.iterdir() if entry.suffix != ".parquet"]
