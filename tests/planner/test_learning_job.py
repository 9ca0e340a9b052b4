"""A job whose lengths aren't known, through the steps that it really takes: sample, plan, and a shard that learns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.dry_run import DryRun
from blendserve.dual_scanner import Front
from blendserve.engine.kv_cache import KVCache
from blendserve.engine.request import Completion, FinishReason
from blendserve.engine.scheduler import Scheduler
from blendserve.engine.shard_reader import ShardReader
from blendserve.job_folder import JobFolder
from blendserve.length_learning import LEARNING_KEY
from blendserve.planner import sample as sample_module
from blendserve.planner.analyze import analyze
from blendserve.planner.plan import make_plan
from blendserve.planner.sample import write_sample_plan
from blendserve.schemas import COMPLETIONS
from tests.planner.jobs import make_spec, write_job, write_model

LIMIT = 20  # output tokens of a sampled request
NUM_SHORT, NUM_LONG, LONG_OUTPUT = 400, 60, 90


def output_tokens(row: int) -> int:
    return LONG_OUTPUT if row >= NUM_SHORT else 2


def write_both_kinds(tmp_path: Path) -> JobFolder:
    """Short answers to long prompts, then long answers to short ones; each kind begins with a token of its own."""
    short = [[1, row % 250, row // 250] + [9] * 30 for row in range(NUM_SHORT)]
    long = [[2, row, 7] for row in range(NUM_LONG)]
    return write_job(tmp_path / "job", short + long, max_tokens=200)


def run_sample(folder: JobFolder) -> list[int]:
    """Write completions as an engine would: those that the limit cuts off end with `length`."""
    plan = json.loads((folder.sample / "plan.json").read_text())
    table = pq.read_table(folder.sample / plan["shards"][0]["file"])
    rows = []
    for row, limit in zip(table["row_index"].to_pylist(), table["max_tokens"].to_pylist(), strict=True):
        count = min(output_tokens(row), limit)
        reason = "stop" if output_tokens(row) < limit else "length"
        counts = {"num_prompt_tokens": 3, "num_cached_tokens": 0, "num_completion_tokens": count}
        ids = {"row_index": row, "request_id": f"request-{row}", "completion": "x", "error": None}
        rows.append({**ids, **counts, "completion_token_ids": list(range(count)), "finish_reason": reason})
    path = folder.completions / "sample" / "shard-00000" / "part-00000.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=COMPLETIONS), path)
    return table["row_index"].to_pylist()


def plan_both_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **settings: object) -> tuple[Path, list[int]]:
    monkeypatch.setattr(sample_module, "SAMPLE_TOKENS", LIMIT)
    folder, model = write_both_kinds(tmp_path), write_model(tmp_path / "model")
    spec = make_spec(folder, **settings)
    analyze(folder, dedupe=True)
    assert write_sample_plan(folder, spec, model) > 16
    sampled = run_sample(folder)
    (shard,) = make_plan(folder, spec, model).shards
    return folder.plan / shard.file, sampled


def test_what_the_sample_cut_off_goes_on_where_it_stopped(tmp_path, monkeypatch):
    path, sampled = plan_both_kinds(tmp_path, monkeypatch)
    reader = ShardReader(path, seed=0, is_two_ended=True, done_rows=())
    requests = {(request := reader.request(place)).row_index: request for place in range(reader.num_requests)}
    cut_off = {row for row in sampled if row >= NUM_SHORT}
    assert cut_off and set(requests) == set(range(NUM_SHORT + NUM_LONG)) - (set(sampled) - cut_off)
    for row, request in requests.items():
        assert request.output_token_ids == (list(range(LIMIT)) if row in cut_off else [])
        assert request.max_tokens == 200


def test_with_stop_strings_a_cut_off_request_begins_again(tmp_path, monkeypatch):
    path, _ = plan_both_kinds(tmp_path, monkeypatch, stop=("END",))
    assert pq.read_table(path)["generated_token_ids"].null_count == pq.read_metadata(path).num_rows


def test_the_engine_learns_from_its_own_completions(tmp_path, monkeypatch):
    path, _ = plan_both_kinds(tmp_path, monkeypatch)
    reader = ShardReader(path, seed=0, is_two_ended=True, done_rows=())
    assert reader.learner is not None
    longest_row = reader.request(reader.scanner.peek(Front.RIGHT)).row_index
    assert longest_row >= NUM_SHORT  # the sample has told the kinds apart
    before = reader.request(reader.scanner.peek(Front.RIGHT)).estimated_output_tokens
    for row in range(NUM_SHORT, NUM_SHORT + 30):
        if row in reader.remaining_row_indices:
            reader.finish(Completion(row, str(row), "x", tuple(range(LONG_OUTPUT)), FinishReason.STOP, None, 3, 0))
    reader.learner.revise(np.zeros(0, np.int64), np.zeros(0, np.int64))
    after = reader.request(reader.scanner.peek(Front.RIGHT)).estimated_output_tokens
    assert before != after
    assert after == pytest.approx(LONG_OUTPUT, rel=0.15)


def test_the_scheduler_finishes_all_while_it_learns(tmp_path, monkeypatch):
    path, _ = plan_both_kinds(tmp_path, monkeypatch)
    reader = ShardReader(path, seed=0, is_two_ended=True, done_rows=())
    cache = KVCache(100, 4, True)
    scheduler = Scheduler(reader, cache, max_num_seqs=16, max_num_batched_tokens=64, max_model_len=256)
    ended: list[int] = []
    for step in DryRun(scheduler, lambda request: output_tokens(request.row_index)).steps():
        assert not step.batch.failed
        for request in step.ended:
            ended.append(request.row_index)
            reader.finish(Completion.of(request, FinishReason.STOP, "x"))
        cache.check_integrity(request for request in scheduler.running.requests if request is not None)
    assert sorted(ended) == sorted(reader.row_indices.tolist())
    assert cache.num_used_blocks == 0


def test_nothing_is_learnt_where_all_is_known(tmp_path):
    folder = write_job(tmp_path / "job", [[1, row] for row in range(40)], hints=[5] * 40)
    analyze(folder, dedupe=True)
    (shard,) = make_plan(folder, make_spec(folder), write_model(tmp_path / "model")).shards
    assert ShardReader(folder.plan / shard.file, seed=0, is_two_ended=True, done_rows=()).learner is None
    dfs = make_plan(folder, make_spec(folder, policy="dfs"), tmp_path / "model").shards[0]
    assert LEARNING_KEY not in (pq.read_schema(folder.plan / dfs.file).metadata or {})
