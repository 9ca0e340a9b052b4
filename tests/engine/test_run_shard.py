"""A shard killed, stopped or refused at any point goes on where it was, and no request is generated twice."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blendserve import lease
from blendserve.engine import shard_folder
from blendserve.engine.detokenizer import Detokenizer
from blendserve.engine.run_shard import Progress, main, run_shard
from blendserve.errors import Interrupted, InUseError, OutputError, PlanError
from blendserve.file_store import LocalStore
from blendserve.lease import counted_files
from blendserve.manifest import ShardManifest, read_manifest
from blendserve.schemas import COMPLETIONS, STEP_METRICS
from tests.engine.engine_runs import generate, make_prompts, stated_requests, write_plan

NUM_REQUESTS = 40
PROMPTS = make_prompts(NUM_REQUESTS, longest=12)
REQUESTS = stated_requests(PROMPTS, 8)


def never() -> bool:
    return False


def run(plan_dir: Path, should_stop: Callable[[], bool] = never) -> ShardManifest:
    return run_shard(plan_dir, 0, should_stop=should_stop, on_progress=None)


def completions(plan_dir: Path) -> list[dict[str, Any]]:
    """All completions that count in the order of their rows, after a check that each request has one only."""
    folder = plan_dir.parent / "completions/shard-00000"
    rows: list[dict[str, Any]] = []
    for name in counted_files(LocalStore(folder), "part-"):
        table = pq.read_table(folder / name)
        assert table.schema == COMPLETIONS
        rows += table.to_pylist()
    assert len({row["row_index"] for row in rows}) == len(rows)
    return sorted(rows, key=lambda row: int(row["row_index"]))


def results(plan_dir: Path) -> list[tuple[Any, ...]]:
    return [(row["row_index"], row["completion_token_ids"], row["finish_reason"]) for row in completions(plan_dir)]


def start(plan_dir: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "blendserve.engine.run_shard", str(plan_dir), "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for_part(plan_dir: Path, process: subprocess.Popen[str]) -> None:
    folder = plan_dir.parent / "completions/shard-00000"
    deadline = time.monotonic() + 120
    while not list(folder.glob("part-*.parquet")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def whole(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """What an uninterrupted run gives."""
    plan_dir = tmp_path_factory.mktemp("job") / "plan"
    write_plan(plan_dir, llama, REQUESTS)
    run(plan_dir)
    return results(plan_dir)


@pytest.fixture
def plan_dir(llama: Path, tmp_path: Path) -> Path:
    write_plan(tmp_path / "plan", llama, REQUESTS)
    return tmp_path / "plan"


def test_a_shard_leaves_completions_metrics_and_its_manifest(llama: Path, plan_dir: Path) -> None:
    told: list[Progress] = []
    manifest = run_shard(plan_dir, 0, should_stop=never, on_progress=told.append)
    folder = plan_dir.parent / "completions/shard-00000"
    rows = completions(plan_dir)
    assert [row["completion_token_ids"] for row in rows] == generate(llama, PROMPTS, 8)
    assert [row["request_id"] for row in rows] == [f"request-{row}" for row in range(NUM_REQUESTS)]
    assert all(row["num_completion_tokens"] == len(row["completion_token_ids"]) for row in rows)
    assert read_manifest(folder / "shard.json", ShardManifest) == manifest
    assert (manifest.num_requests, manifest.num_succeeded, manifest.num_resumed) == (NUM_REQUESTS, NUM_REQUESTS, 0)
    assert manifest.num_prompt_tokens == sum(map(len, PROMPTS))
    assert manifest.num_cached_tokens == sum(row["num_cached_tokens"] for row in rows) > 0
    metrics = pq.read_table(folder / "metrics.parquet")
    assert metrics.schema == STEP_METRICS and metrics.num_rows == manifest.num_steps
    steps = metrics.to_pydict()
    assert sum(steps["num_prefill_tokens"]) + sum(steps["num_cached_tokens"]) == manifest.num_prompt_tokens
    assert steps["num_waiting"][-1] == 0
    assert told[-1].done == told[-1].total == NUM_REQUESTS and told[-1].tokens_per_second > 0
    assert told[0].density == 1.0, "what the plan says of these requests"
    assert told[-1].density is None, "nothing runs any more"


@pytest.mark.parametrize("is_wanted", [False, True])
def test_texts_are_logged_when_that_is_asked_for(
    llama: Path, tmp_path: Path, is_wanted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    write_plan(tmp_path / "plan", llama, REQUESTS, log_texts=is_wanted)
    run(tmp_path / "plan")
    logged = [json.loads(line) for line in caplog.messages if line.startswith('{"event": "completion"')]
    detokenizer = Detokenizer(llama, ())
    expected = {f"request-{row}": detokenizer.decode(prompt) for row, prompt in enumerate(PROMPTS)}
    assert {line["request_id"]: line["prompt"] for line in logged} == (expected if is_wanted else {})
    texts = {row["request_id"]: row["completion"] for row in completions(tmp_path / "plan")}
    assert all(line["completion"] == texts[line["request_id"]] for line in logged)


def test_a_finished_shard_is_not_run_again(plan_dir: Path) -> None:
    first = run(plan_dir)
    folder = plan_dir.parent / "completions/shard-00000"
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert run(plan_dir, should_stop=lambda: True) == first
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times


def test_stopped_between_steps_it_goes_on_later(llama: Path, tmp_path: Path, whole: list[tuple[Any, ...]]) -> None:
    plan_dir = tmp_path / "plan"
    write_plan(plan_dir, llama, REQUESTS, max_num_seqs=8)
    num_attempts, num_before = 0, -1
    while True:
        asked = iter(range(1000))
        num_attempts += 1
        try:
            manifest = run(plan_dir, should_stop=lambda asked=asked: next(asked) >= 14)  # type: ignore[misc]
            break
        except Interrupted as error:
            assert f"of {NUM_REQUESTS} requests finished" in str(error)
            assert len(completions(plan_dir)) > num_before
            num_before = len(completions(plan_dir))
    assert num_attempts > 1 and manifest.num_resumed == num_before > 0
    assert results(plan_dir) == whole


def test_killed_in_the_middle_it_loses_and_repeats_nothing(llama: Path, tmp_path: Path) -> None:
    requests = stated_requests(make_prompts(300, longest=12), 10)
    for name in ("killed", "whole"):
        write_plan(tmp_path / name / "plan", llama, requests, max_num_seqs=8)
    plan_dir = tmp_path / "killed/plan"
    process = start(plan_dir)
    wait_for_part(plan_dir, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = completions(plan_dir)
    (plan_dir.parent / "completions/shard-00000/.part-00009.parquet.abc.tmp").write_bytes(b"half a file")
    manifest = run(plan_dir)
    assert 0 < manifest.num_resumed == len(before) < 300
    after = completions(plan_dir)
    assert len(after) == 300
    assert [row for row in after if row["row_index"] in {kept["row_index"] for kept in before}] == before
    assert not list((plan_dir.parent / "completions/shard-00000").glob(".*.tmp"))
    run(tmp_path / "whole/plan")
    assert results(plan_dir) == results(tmp_path / "whole/plan")


def test_sigterm_writes_what_is_finished_and_ends_with_130(llama: Path, tmp_path: Path) -> None:
    plan_dir = tmp_path / "plan"
    write_plan(plan_dir, llama, stated_requests(make_prompts(300, longest=12), 10), max_num_seqs=8)
    process = start(plan_dir)
    wait_for_part(plan_dir, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    done = len(completions(plan_dir))
    assert f"asked to stop with {done} of 300 requests finished" in errors
    assert json.loads(next(line for line in errors.splitlines() if line.startswith("{")))["event"] == "progress"
    assert not (plan_dir.parent / "completions/shard-00000/shard.json").exists()


def test_the_last_line_of_stdout_is_the_manifest(
    plan_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert main([str(plan_dir), "0"]) == 0
    assert ShardManifest.model_validate_json(capsys.readouterr().out.splitlines()[-1]).status == "done"
    assert main([str(plan_dir), "7"]) == 2
    assert "has no shard 7. Expected 0 to 0." in capsys.readouterr().err
    assert main([str(plan_dir.parent), "0"]) == 2


def test_a_second_process_is_kept_out(plan_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_folder, "STOP_SECONDS", 0.3)
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.6)
    store = LocalStore(plan_dir.parent / "completions/shard-00000")
    with lease.acquire_lease(store, "Shard"), pytest.raises(InUseError, match=f"in use by process {os.getpid()} on"):
        run(plan_dir)
    assert run(plan_dir).num_succeeded == NUM_REQUESTS


def test_a_process_that_was_taken_over_from_publishes_nothing(
    llama: Path, tmp_path: Path, whole: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one is paused in mid-shard for longer than its lease, as by SIGSTOP; the second one finishes."""
    plan_dir = tmp_path / "plan"
    write_plan(plan_dir, llama, REQUESTS, max_num_seqs=4)
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.4)
    monkeypatch.setattr(lease.Lease, "_keep_alive", lambda _self: None)
    monkeypatch.setattr(shard_folder, "_PART_COMPLETIONS", 4)
    folder = plan_dir.parent / "completions/shard-00000"
    published: list[ShardManifest] = []

    def while_paused() -> bool:
        if len(list(folder.glob("part-*"))) >= 2 and not published:
            published.append(run(plan_dir))
        return False

    with pytest.raises(InUseError, match="was taken over by another process"):
        run(plan_dir, should_stop=while_paused)
    (manifest,) = published
    assert manifest.num_succeeded == NUM_REQUESTS and manifest.num_resumed >= 8
    assert read_manifest(folder / "shard.json", ShardManifest) == manifest
    assert results(plan_dir) == whole


def test_metrics_and_seconds_cover_every_attempt(llama: Path, tmp_path: Path) -> None:
    plan_dir = tmp_path / "plan"
    write_plan(plan_dir, llama, REQUESTS, max_num_seqs=8)
    asked = iter(range(1000))
    with pytest.raises(Interrupted):
        run(plan_dir, should_stop=lambda: next(asked) >= 14)
    manifest = run(plan_dir)
    folder = plan_dir.parent / "completions/shard-00000"
    steps = pq.read_table(folder / "metrics.parquet").to_pydict()
    assert steps["step"] == list(range(manifest.num_steps)) and manifest.num_steps > 14
    assert steps["started_seconds"] == sorted(steps["started_seconds"])
    assert manifest.seconds == steps["started_seconds"][-1] + steps["step_seconds"][-1]
    assert not list(folder.glob("steps-*")), "they are all in metrics.parquet"


def test_killed_before_its_manifest_is_there_it_keeps_its_metrics(
    plan_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(Exception):
        pass

    written: list[ShardManifest] = []
    write = LocalStore.write

    def die(store: LocalStore, name: str, content: bytes) -> None:
        if name == "shard.json":
            written.append(ShardManifest.model_validate_json(content))
            raise KilledError
        write(store, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "write", die)
        with pytest.raises(KilledError):
            run(plan_dir)
    manifest = run(plan_dir)
    assert manifest.num_resumed == NUM_REQUESTS and manifest.num_steps > 0
    assert (manifest.num_steps, manifest.seconds) == (written[0].num_steps, written[0].seconds)
    folder = plan_dir.parent / "completions/shard-00000"
    assert pq.read_table(folder / "metrics.parquet").num_rows == manifest.num_steps
    assert not list(folder.glob("steps-*"))


def test_a_full_disk_is_reported_and_loses_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_dir = tmp_path / "plan"
    write_plan(plan_dir, llama, stated_requests(make_prompts(100, longest=12), 4), max_num_seqs=8)
    write_bytes, num_written = Path.write_bytes, []

    def run_full(path: Path, content: bytes) -> int:
        if num_written and "part-" in path.name:
            write_bytes(path, b"some")
            raise OSError(errno.ENOSPC, "No space left on device")
        num_written.extend([path] if "part-" in path.name else [])
        return write_bytes(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", run_full)
        with pytest.raises(OutputError, match=r"can't be written: .*No space left on device.*make room"):
            run(plan_dir)
    assert len(completions(plan_dir)) == 64
    assert not list((plan_dir.parent / "completions/shard-00000").glob(".*.tmp"))
    assert run(plan_dir).num_resumed == 64
    assert len(completions(plan_dir)) == 100


def test_failed_rows_run_again_and_do_not_stop_the_others(llama: Path, tmp_path: Path) -> None:
    requests = [*REQUESTS, {"row_index": NUM_REQUESTS, "prompt_token_ids": [1] * 300, "max_tokens": 4}]
    plan_dir = tmp_path / "plan"
    write_plan(plan_dir, llama, requests)
    manifest = run(plan_dir)
    assert (manifest.num_succeeded, manifest.num_failed) == (NUM_REQUESTS, 1)
    failed = completions(plan_dir)[-1]
    assert failed["finish_reason"] == "error" and "300 tokens" in failed["error"] and failed["completion"] is None
    (plan_dir.parent / "completions/shard-00000/shard.json").unlink()
    again = run(plan_dir)
    assert (again.num_resumed, again.num_failed) == (NUM_REQUESTS, 1)
    assert len(completions(plan_dir)) == NUM_REQUESTS + 1


def test_a_new_plan_keeps_the_rows_that_are_done(llama: Path, tmp_path: Path) -> None:
    plan_dir = tmp_path / "plan"
    write_plan(plan_dir, llama, REQUESTS[:10])
    run(plan_dir)
    write_plan(plan_dir, llama, REQUESTS[5:], plan_id="another")
    manifest = run(plan_dir)
    assert (manifest.plan_id, manifest.num_requests, manifest.num_resumed) == ("another", NUM_REQUESTS - 5, 5)
    assert len(completions(plan_dir)) == NUM_REQUESTS


def test_a_broken_shard_file_is_named(plan_dir: Path) -> None:
    shard = plan_dir / "shards/shard-00000.parquet"
    pq.write_table(pa.table({"row_index": [1]}), shard)
    with pytest.raises(PlanError, match=r"shard-00000\.parquet: expected the columns shard_position"):
        run(plan_dir)
    shard.write_bytes(b"PAR1 not really")
    with pytest.raises(PlanError, match="can't be read"):
        run(plan_dir)
