"""One engine takes several shards: each gets what it would get alone, and a kill or a stop costs nothing in any."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from blendserve.engine import run_shard as module
from blendserve.engine.engine import LLMEngine
from blendserve.engine.run_shard import ShardRunner, main, run_shard
from blendserve.errors import PlanError
from blendserve.file_store import LocalStore
from blendserve.lease import counted_files
from blendserve.manifest import ShardManifest, read_manifest, write_manifest
from tests import forked
from tests.engine.engine_runs import make_prompts, stated_requests, write_plan

NUM_SHARDS, NUM_REQUESTS = 3, 20
LONG = 200  # requests of a shard that is killed or stopped in the middle


def requests_of(shard: int, num_requests: int, max_tokens: int) -> list[dict[str, Any]]:
    """Other prompts in every shard, under the same shared prefixes."""
    prompts = make_prompts(num_requests * NUM_SHARDS, num_prefixes=2, longest=12)[shard::NUM_SHARDS]
    stated = stated_requests(prompts, max_tokens)
    return [{**request, "row_index": 1000 * shard + request["row_index"]} for request in stated]


def write_shards(plan_dir: Path, model: Path, sizes: list[int], max_tokens: int = 6, **spec: Any) -> Path:
    """A plan with a shard of each size."""
    shards = []
    for number, size in enumerate(sizes):
        plan = write_plan(plan_dir, model, requests_of(number, size, max_tokens), **spec)
        (shard,) = plan.shards
        shards.append(shard.model_copy(update={"shard": number, "file": f"shards/{number}.parquet"}))
        (plan_dir / shard.file).rename(plan_dir / shards[-1].file)
    write_manifest(plan_dir / "plan.json", plan.model_copy(update={"shards": tuple(shards)}))
    return plan_dir


def results(plan_dir: Path) -> dict[int, list[int]]:
    """Tokens by row of all shards, after a check that each row came out once."""
    rows = []
    for folder in sorted((plan_dir.parent / "completions").iterdir()):
        for name in counted_files(LocalStore(folder), "part-"):
            rows += pq.read_table(folder / name).to_pylist()
    found = {row["row_index"]: row["completion_token_ids"] for row in rows}
    assert len(found) == len(rows)
    return found


def manifests(plan_dir: Path) -> list[ShardManifest]:
    return [
        read_manifest(path, ShardManifest)
        for path in sorted((plan_dir.parent / "completions").glob("shard-*/shard.json"))
    ]


def run_alone(plan_dir: Path) -> list[ShardManifest]:
    """Every shard by an engine of its own."""
    numbers = range(len(list((plan_dir / "shards").iterdir())))
    return [run_shard(plan_dir, number, should_stop=lambda: False, on_progress=None) for number in numbers]


def order(plan_dir: Path, orders: bytes, *options: str) -> int:
    """The command, with `orders` as its whole stdin; for a process of its own."""
    read_end, write_end = os.pipe()
    os.write(write_end, orders)
    os.close(write_end)
    module._STDIN = read_end
    return main([*options, str(plan_dir)])


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Where the test writes what the command reads as its stdin."""
    read_end, write_end = os.pipe()
    monkeypatch.setattr(module, "_STDIN", read_end)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    yield write_end
    os.close(read_end)


def test_one_engine_runs_all_shards(
    llama: Path, tmp_path: Path, stdin: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = [NUM_REQUESTS, 2 * NUM_REQUESTS, NUM_REQUESTS]
    plan_dir = write_shards(tmp_path / "together/plan", llama, sizes)
    load, loaded = LLMEngine.__init__, []

    def count(engine: LLMEngine, *arguments: Any, **more: Any) -> None:
        loaded.append(more)
        load(engine, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(LLMEngine, "__init__", count)
        os.write(stdin, b"1\n0\n2\n")
        os.close(stdin)
        assert main([str(plan_dir)]) == 0
    (sized,) = loaded
    tokens = [sum(6 + len(request["prompt_token_ids"]) for request in requests_of(1, sizes[1], 6))]
    assert (sized["max_useful_tokens"], sized["max_requests"]) == (tokens[0], sizes[1]), "the largest may come last"
    captured = capsys.readouterr()
    told = [ShardManifest.model_validate_json(line) for line in captured.out.splitlines()]
    assert [manifest.shard for manifest in told] == [1, 0, 2]
    assert captured.err.count('{"event": "next"}') == 4
    alone = run_alone(write_shards(tmp_path / "alone/plan", llama, sizes))
    assert results(plan_dir) == results(tmp_path / "alone/plan")
    for one, other in zip(alone, manifests(plan_dir), strict=True):
        assert (one.num_requests, one.num_prompt_tokens) == (other.num_requests, other.num_prompt_tokens)
    assert manifests(plan_dir)[1] == told[0] and told[0].num_cached_tokens == alone[1].num_cached_tokens
    assert told[1].num_cached_tokens > alone[0].num_cached_tokens, "prefixes of the shard before are still there"


def test_every_shard_has_metrics_and_counts_of_its_own(llama: Path, tmp_path: Path) -> None:
    plan_dir = write_shards(tmp_path / "plan", llama, [NUM_REQUESTS] * NUM_SHARDS)
    runner = ShardRunner(plan_dir, None, should_stop=lambda: False, on_progress=None)
    for number in range(NUM_SHARDS):
        manifest = runner.run(number)
        steps = pq.read_table(tmp_path / f"completions/shard-{number:05d}/metrics.parquet").to_pydict()
        assert steps["step"] == list(range(manifest.num_steps))
        assert steps["started_seconds"][0] == 0.0 and steps["num_waiting"][-1] == 0
        assert manifest.seconds == steps["started_seconds"][-1] + steps["step_seconds"][-1]
        assert sum(steps["num_prefill_tokens"]) + sum(steps["num_cached_tokens"]) == manifest.num_prompt_tokens
        assert sum(steps["num_cached_tokens"]) == manifest.num_cached_tokens


def test_finished_shards_load_no_model(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_dir = write_shards(tmp_path / "plan", llama, [NUM_REQUESTS] * NUM_SHARDS)
    done = run_alone(plan_dir)
    monkeypatch.setattr(LLMEngine, "__init__", None)
    runner = ShardRunner(plan_dir, None, should_stop=lambda: True, on_progress=None)
    assert [runner.run(number) for number in range(NUM_SHARDS)] == done


def wait_until(is_so: Callable[[], bool], is_running: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not is_so():
        assert is_running() and time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("moment", ["shard-00000/shard.json", "shard-00001/part-*"])
def test_killed_at_any_shard_it_loses_and_repeats_nothing(llama: Path, tmp_path: Path, moment: str) -> None:
    plan_dir = write_shards(tmp_path / "plan", llama, [LONG] * NUM_SHARDS, max_num_seqs=8)
    process = forked.start(order, plan_dir, b"0\n1\n2\n")
    wait_until(lambda: any((tmp_path / "completions").glob(moment)), process.is_alive)
    forked.kill(process)
    before = results(plan_dir)
    assert len(before) < LONG * NUM_SHARDS
    done = run_alone(plan_dir)
    assert sum(manifest.num_resumed for manifest in done if manifest.shard) + LONG >= len(before)
    assert before.items() <= results(plan_dir).items()
    assert [manifest.num_succeeded for manifest in done] == [LONG] * NUM_SHARDS


def test_a_dead_parent_stops_the_shard_that_runs(llama: Path, tmp_path: Path, stdin: int) -> None:
    """The end of stdin in mid-shard: what is finished is kept, and no other shard begins."""
    plan_dir = write_shards(tmp_path / "plan", llama, [LONG] * 2, max_num_seqs=4)
    os.write(stdin, b"0\n")

    def die() -> None:
        wait_until(lambda: any(tmp_path.glob("completions/shard-00000/part-*")), lambda: True)
        os.close(stdin)

    parent = threading.Thread(target=die)
    parent.start()
    assert main(["--stop-at-eof", str(plan_dir)]) == 130
    parent.join()
    assert 0 < len(results(plan_dir)) < LONG and not manifests(plan_dir)


def test_a_stop_between_two_shards_ends_it(llama: Path, tmp_path: Path) -> None:
    """It waits for the next shard's number when the signal comes."""
    plan_dir = write_shards(tmp_path / "plan", llama, [NUM_REQUESTS] * 2)
    process = forked.start(order_one_and_wait, plan_dir)
    wait_until(lambda: any(tmp_path.glob("completions/shard-00000/shard.json")), process.is_alive)
    os.kill(process.pid or 0, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 130
    assert [manifest.shard for manifest in manifests(plan_dir)] == [0]


def order_one_and_wait(plan_dir: Path) -> int:
    read_end, write_end = os.pipe()
    os.write(write_end, b"0\n")
    module._STDIN = read_end
    return main(["--stop-at-eof", str(plan_dir)])


def test_what_is_no_shard_is_refused(
    llama: Path, tmp_path: Path, stdin: int, capsys: pytest.CaptureFixture[str]
) -> None:
    plan_dir = write_shards(tmp_path / "plan", llama, [NUM_REQUESTS] * 2)
    os.write(stdin, b"first\n")
    os.close(stdin)
    assert main([str(plan_dir)]) == PlanError.exit_status
    assert "Expected the number of a shard as a line of stdin, got b'first" in capsys.readouterr().err
