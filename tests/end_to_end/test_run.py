"""The whole job from the command line: what it leaves, what it does when called again, what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blendserve.job_record import holding
from tests.end_to_end.command_line import (
    NUM_ROWS,
    Blendserve,
    completions,
    generated_row_indices,
    job_options,
    results,
)


def test_from_parquet_to_parquet(
    blendserve_process: Blendserve, requests: Path, tiny_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    done = blendserve_process("run", *job_options(requests, output, tiny_model))
    assert done.status == 0, done.stderr
    manifest = done.result
    counts = manifest["counts"]
    assert counts["input_rows"] == NUM_ROWS == counts["succeeded"] + counts["duplicates_resolved"]
    assert counts["duplicates_resolved"] == 2
    rows = results(output)
    inputs = pq.read_table(requests).to_pylist()
    assert [{name: row[name] for name in inputs[0]} for row in rows] == inputs
    assert [row["request_id"] for row in rows] == [row["id"] for row in inputs]
    for row in rows:
        assert row["finish_reason"] in ("stop", "length")
        assert 1 <= row["num_completion_tokens"] <= row["max_tokens"]
        assert 0 <= row["num_cached_tokens"] <= row["num_prompt_tokens"]
    assert sum(row["num_cached_tokens"] for row in rows) > 0
    assert manifest["fingerprint"]
    assert {"tokenize", "plan", "merge"} <= set(manifest["timings_seconds"])
    assert "torch" in manifest["versions"]
    newest = max((output / name).stat().st_mtime_ns for name in ("manifest.json", "report.html"))
    assert (output / "_SUCCESS").stat().st_mtime_ns >= newest

    again = blendserve_process("run", *job_options(requests, output, tiny_model))
    assert (again.status, again.result["already_done"]) == (0, True)
    assert again.result["counts"] == counts
    assert (output / "_SUCCESS").stat().st_mtime_ns >= newest


def test_a_finished_job_says_so(blendserve: Blendserve, requests: Path, tiny_model: Path, tmp_path: Path) -> None:
    options = [option for option in job_options(requests, tmp_path / "out", tiny_model) if option != "--json"]
    first = blendserve("run", *options, "--limit", 4)
    assert "Job finished" in first.stdout
    assert "finished already" in blendserve("run", *options, "--limit", 4).stdout
    before = results(tmp_path / "out")
    shown = blendserve("show", tmp_path / "out", "--rows", 9, "--json").result["rows"]
    assert [row["request_id"] for row in shown] == [row["request_id"] for row in before]
    shutil.rmtree(tmp_path / "out" / "results")
    assert "Job finished" in blendserve("run", *options, "--limit", 4).stdout
    assert results(tmp_path / "out") == before


def test_every_way_of_running_gives_the_same_text(
    blendserve: Blendserve, blendserve_process: Blendserve, requests: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """The last one with two engines side by side, in processes of their own."""
    ways = {
        "blend": [],
        "dfs": ["--policy", "dfs", "--shards", 3],
        "fcfs": ["--policy", "fcfs", "--max-num-batched-tokens", 7],
        "random": ["--policy", "random", "--no-prefix-cache"],
        "longest": ["--policy", "longest", "--gpus", 2, "--num-blocks", 24],
    }
    texts = {}
    for name, options in ways.items():
        call = blendserve_process if "--gpus" in options else blendserve
        done = call("run", *job_options(requests, tmp_path / name, tiny_model), *options)
        assert done.status == 0, done.stderr
        texts[name] = completions(tmp_path / name)
    assert all(text == texts["blend"] for text in texts.values())


def test_plan_then_shards_then_merge(blendserve: Blendserve, requests: Path, tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "row_index=0" / "max_tokens=1" / "run[1]"  # neither partitions nor a pattern
    planned = blendserve("plan", *job_options(requests, output, tiny_model), "--shards", 2)
    assert planned.status == 0, planned.stderr
    assert not (output / "completions").exists()
    early = blendserve("merge", output, "--json")
    assert early.status != 0
    assert "have no completion" in early.result["error"]
    for shard in planned.result["shards"]:
        assert blendserve("run-shard", planned.result["plan_dir"], shard["shard"]).status == 0
    with holding(output):
        busy = blendserve("merge", output, "--json")
    assert (busy.status, (output / "results").exists()) == (75, False), busy.stdout
    merged = blendserve("merge", output, "--json")
    assert merged.status == 0, merged.stderr
    assert (output / "_SUCCESS").is_file()
    assert blendserve("report", output).status == 0
    assert blendserve("show", output).status == 0
    whole = tmp_path / "whole"
    blendserve("run", *job_options(requests, whole, tiny_model))
    assert completions(output) == completions(whole)


def test_unknown_shards_are_refused(blendserve: Blendserve, requests: Path, tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    blendserve("plan", *job_options(requests, output, tiny_model), "--shards", 1)
    done = blendserve("run-shard", output, 1, "--json")
    assert (done.status, done.result["exit_status"]) == (2, 2)
    assert "has no shard 1" in done.result["error"]


def test_a_changed_job_is_refused_unless_forced(
    blendserve: Blendserve, requests: Path, tiny_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    options = job_options(requests, output, tiny_model)
    assert blendserve("run", *options).status == 0
    before = completions(output)
    refused = blendserve("run", *options, "--max-tokens", 2, "--temperature", 0.5)
    assert refused.status == 2
    assert "sampling changed" in refused.result["error"]
    assert completions(output) == before
    forced = blendserve("run", *options, "--temperature", 0.9, "--seed", 3, "--force")
    assert forced.status == 0, forced.stderr
    assert completions(output) != before


def test_rows_that_fail_come_out_with_their_reason(blendserve: Blendserve, tiny_model: Path, tmp_path: Path) -> None:
    prompts = ["fine", None, "", "x" * 300, "also fine"]
    pq.write_table(pa.table({"prompt": prompts}), tmp_path / "in.parquet")
    options = ["--input", tmp_path / "in.parquet", "--model", tiny_model, "--max-tokens", 4, "--json"]
    done = blendserve("run", *options, "--output", tmp_path / "out")
    assert done.status == 0, done.stderr
    rows = results(tmp_path / "out")
    assert [row["finish_reason"] == "rejected" for row in rows] == [False, True, True, True, False]
    assert [bool(row["error"]) for row in rows] == [False, True, True, True, False]
    assert done.result["counts"]["rejected"] == 3
    strict = blendserve("run", *options, "--output", tmp_path / "strict", "--on-row-error", "fail")
    assert strict.status == 1
    assert (tmp_path / "strict" / "_SUCCESS").is_file()
    cut = blendserve("run", *options, "--output", tmp_path / "cut", "--truncate-prompt")
    assert cut.result["counts"]["rejected"] == 2


def test_a_job_of_rejected_rows_only(blendserve: Blendserve, tiny_model: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["", " "]}), tmp_path / "in.parquet")
    options = ["--input", tmp_path / "in.parquet", "--output", tmp_path / "out", "--model", tiny_model, "--json"]
    done = blendserve("run", *options)
    assert done.status == 0, done.stderr
    assert done.result["counts"] == {
        "input_rows": 2,
        "succeeded": 0,
        "failed": 0,
        "rejected": 2,
        "duplicates_resolved": 0,
        "missing": 0,
    }


def test_a_job_file_states_the_same_options(blendserve: Blendserve, tiny_model: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["one", "two"]}), tmp_path / "in.parquet")
    job = tmp_path / "job.yaml"
    job.write_text(
        f"input: in.parquet\noutput: out\nmodel: {tiny_model}\ntemplate: 'Of {{{{ body }}}}.'\nmax_tokens: 3\n"
    )
    done = blendserve("run", "--job", "job.yaml", "--json", cwd=tmp_path)
    assert done.status == 0, done.stderr
    assert [row["num_prompt_tokens"] for row in results(tmp_path / "out")] == [7, 7]
    job.write_text("input: in.parquet\noutput: out\nmaxtokens: 3\n")
    refused = blendserve("run", "--job", "job.yaml", "--json", cwd=tmp_path)
    assert refused.status == 2
    assert "Unknown option 'maxtokens'" in refused.result["error"]


def _missing_column(folder: Path) -> dict[str, object]:
    return {"--prompt-column": "nothing"}


def _foreign_output(folder: Path) -> dict[str, object]:
    (folder / "theirs").mkdir()
    (folder / "theirs" / "data.csv").touch()
    return {"--output": folder / "theirs"}


def _unknown_model(folder: Path) -> dict[str, object]:
    return {"--model": folder / "no-such-model"}


def _unknown_architecture(folder: Path) -> dict[str, object]:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"architectures": ["WizardForCausalLM"], "model_type": "wizard"}')
    for name in ("tokenizer.json", "model.safetensors"):
        (folder / "model" / name).write_text("{}")
    return {"--model": folder / "model"}


def _pickled_weights(folder: Path) -> dict[str, object]:
    (folder / "model").mkdir()
    for name in ("config.json", "tokenizer.json", "pytorch_model.bin"):
        (folder / "model" / name).write_text("{}")
    return {"--model": folder / "model"}


def _bad_value(folder: Path) -> dict[str, object]:
    return {"--temperature": -1}


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (_missing_column, "no column 'nothing'"),
        (_foreign_output, "holds no job of ours"),
        (_unknown_model, "no-such-model"),
        (_unknown_architecture, "WizardForCausalLM"),
        (_pickled_weights, "pytorch_model.bin"),
        (_bad_value, "Option 'temperature'"),
    ],
)
def test_bad_jobs_stop_before_any_work(
    blendserve: Blendserve, requests: Path, tiny_model: Path, tmp_path: Path, break_it: Any, message: str
) -> None:
    options = {"--input": requests, "--output": tmp_path / "out", "--model": tiny_model, "--prompt-column": "ask"}
    options |= break_it(tmp_path)
    done = blendserve("run", *[part for option in options.items() for part in option], "--json")
    assert (done.status, done.result["exit_status"]) == (2, 2)
    assert message in done.result["error"]
    assert message in done.stderr
    assert not (tmp_path / "out" / "work").exists()
    if break_it is _foreign_output:
        assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["data.csv"]


def test_usage_errors_end_with_status_two(blendserve: Blendserve) -> None:
    assert blendserve("run", "--no-such-option").status == 2
    assert blendserve("run", "--json").status == 2
    assert blendserve("run-shard", "nowhere", "0").status == 2


def test_no_request_is_generated_twice(
    blendserve: Blendserve, requests: Path, tiny_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    blendserve("run", *job_options(requests, output, tiny_model), "--shards", 2)
    generated = generated_row_indices(output)
    assert len(generated) == len(set(generated)) == NUM_ROWS - 2
