"""Output lengths of earlier runs: kept by template, used instead of a sample, forgotten by and by."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blendserve.planner.analyze import analyze
from blendserve.planner.length_history import history_file, remember
from blendserve.planner.plan import make_plan
from blendserve.planner.sample import write_sample_plan
from blendserve.schemas import OUTPUT_LENGTH_HISTORY
from tests.planner.jobs import make_spec, write_completions, write_job, write_model

CLASSIFY, WRITE = list(range(100, 140)), list(range(200, 240))


def make_job(root, count=60, *, template="a", seed=0, output=None):
    """Two templates by turns under one chat header, each row with text of its own."""
    random = np.random.default_rng(seed)
    prompts = [
        [1, 2, 3, *(CLASSIFY if row % 2 else WRITE), *random.integers(500, 900, 8).tolist()] for row in range(count)
    ]
    folder = write_job(root, prompts, max_tokens=1000)
    identity = {"input": {}, "model": {"files": "m"}, "prompts": {"template": template}, "sampling": {"seed": seed}}
    job = {"spec": {"output": output or str(root)}, "identity": identity}
    folder.job.write_text(json.dumps(job))
    analyze(folder, dedupe=True)
    return folder


def finish(folder, count=60, factor=1):
    write_completions(folder, "shard-00000", {row: (factor * (3 if row % 2 else 400), "stop") for row in range(count)})
    remember(folder)


def test_the_second_run_needs_no_sample(tmp_path):
    model = write_model(tmp_path / "model")
    first = make_job(tmp_path / "runs/1")
    assert write_sample_plan(first, make_spec(first), model) > 0
    finish(first)
    assert pq.read_schema(history_file(first)).equals(OUTPUT_LENGTH_HISTORY)
    second = make_job(tmp_path / "runs/2", seed=1)
    assert write_sample_plan(second, make_spec(second), model) == 0
    plan = make_plan(second, make_spec(second), model)
    assert plan.summary["output_length_sources"] == {"fixed": 0, "hint": 0, "sample": 0, "history": 60, "max_tokens": 0}
    rows = [row for shard in plan.shards for row in pq.read_table(second.plan / shard.file).to_pylist()]
    assert {row["estimated_output_tokens"] for row in rows if row["row_index"] % 2} == {3}
    assert {row["estimated_output_tokens"] for row in rows if row["row_index"] % 2 == 0} == {400}


def test_another_template_has_a_history_of_its_own(tmp_path):
    finish(make_job(tmp_path / "runs/1"))
    other = make_job(tmp_path / "runs/2", template="b")
    assert not history_file(other).exists()
    assert write_sample_plan(other, make_spec(other), write_model(tmp_path / "model")) > 0


def test_later_runs_count_more(tmp_path):
    finish(make_job(tmp_path / "runs/1"))
    finish(make_job(tmp_path / "runs/2", seed=1), factor=2)
    table = pq.read_table(history_file(make_job(tmp_path / "runs/3"))).to_pylist()
    means = sorted(row["output_tokens"] / row["num_requests"] for row in table)
    assert means == pytest.approx([(0.5 * 3 + 6) / 1.5, (0.5 * 400 + 800) / 1.5])


def test_a_history_that_cannot_be_written_fails_no_job(tmp_path, caplog):
    folder = make_job(tmp_path / "runs/1")
    (tmp_path / "runs/.blendserve").write_text("a file where the folder should be")
    finish(folder)
    assert "not remembered" in caplog.text


@pytest.mark.parametrize("content", [b"", b"PAR1 cut off", "a table of something else"])
def test_a_damaged_history_stops_no_job_and_is_written_anew(tmp_path, caplog, content):
    first = make_job(tmp_path / "runs/1")
    history = history_file(first)
    history.parent.mkdir()
    if isinstance(content, bytes):
        history.write_bytes(content)
    else:
        pq.write_table(pa.table({"something": [content]}), history)
    assert write_sample_plan(first, make_spec(first), write_model(tmp_path / "model")) > 0
    assert "are not used" in caplog.text
    finish(first)
    assert pq.read_table(history).num_rows > 0


def test_nothing_is_remembered_beside_a_url(tmp_path):
    assert history_file(make_job(tmp_path / "runs/1", output="s3://bucket/run")) is None
