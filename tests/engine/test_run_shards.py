"""One engine takes shards that overlap: each gets what it would get alone, and kills and stops cost nothing."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blendserve import lease
from blendserve.engine import run_shard as module
from blendserve.engine import shard_attempt, shard_folder
from blendserve.engine.engine import LLMEngine
from blendserve.engine.request import Completion, Request
from blendserve.engine.run_shard import GivenOrders, Progress, main, run_shard
from blendserve.engine.shard_runner import ShardRunner
from blendserve.errors import InUseError, PlanError
from blendserve.file_store import LocalStore
from blendserve.lease import counted_files
from blendserve.length_learning import LEARNING_KEY, LengthLearner
from blendserve.manifest import ShardManifest, read_manifest, write_manifest
from blendserve.spec import SamplingSpec
from tests import forked
from tests.engine.engine_runs import ListSource, make_engine, make_prompts, run_engine, stated_requests, write_plan

NUM_SHARDS, NUM_REQUESTS = 3, 20
MANY = 100  # requests of a shard that is killed or stopped in the middle
LONG = 120  # output tokens of a request that outlives the shards after its own
ENDLESS = SamplingSpec(ignore_eos=True)


def requests_of(shard: int, num_requests: int, *, max_tokens: int = 6, has_long: bool = False) -> list[dict[str, Any]]:
    """Other prompts in every shard, under the same shared prefixes."""
    prompts = make_prompts(num_requests * NUM_SHARDS, num_prefixes=2, longest=12)[shard::NUM_SHARDS]
    stated = stated_requests(prompts, max_tokens)
    if has_long:
        stated[0]["max_tokens"] = LONG
    return [{**request, "row_index": 1000 * shard + request["row_index"]} for request in stated]


def write_shards(plan_dir: Path, model: Path, shards: list[list[dict[str, Any]]], **spec: Any) -> Path:
    """A plan with a shard of each list of requests."""
    plans = []
    for number, requests in enumerate(shards):
        plan = write_plan(plan_dir, model, requests, sampling=ENDLESS, **spec)
        (shard,) = plan.shards
        plans.append(shard.model_copy(update={"shard": number, "file": f"shards/{number}.parquet"}))
        (plan_dir / shard.file).rename(plan_dir / plans[-1].file)
    write_manifest(plan_dir / "plan.json", plan.model_copy(update={"shards": tuple(plans)}))
    return plan_dir


def equal_shards(num_shards: int, num_requests: int) -> list[list[dict[str, Any]]]:
    return [requests_of(number, num_requests) for number in range(num_shards)]


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
    shards = [requests_of(number, size) for number, size in enumerate([NUM_REQUESTS, 2 * NUM_REQUESTS, NUM_REQUESTS])]
    plan_dir = write_shards(tmp_path / "together/plan", llama, shards)
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
    tokens = sum(6 + len(request["prompt_token_ids"]) for request in shards[1])
    assert (sized["max_useful_tokens"], sized["max_requests"]) == (tokens, len(shards[1])), "the largest may come last"
    captured = capsys.readouterr()
    told = [ShardManifest.model_validate_json(line) for line in captured.out.splitlines()]
    assert [manifest.shard for manifest in told] == [1, 0, 2]
    assert captured.err.count('{"event": "next"}') == 4
    alone = run_alone(write_shards(tmp_path / "alone/plan", llama, shards))
    assert results(plan_dir) == results(tmp_path / "alone/plan")
    for one, other in zip(alone, manifests(plan_dir), strict=True):
        assert (one.num_requests, one.num_prompt_tokens) == (other.num_requests, other.num_prompt_tokens)
    assert manifests(plan_dir) == [told[1], told[0], told[2]]
    assert told[0].num_cached_tokens == alone[1].num_cached_tokens
    assert told[1].num_cached_tokens > alone[0].num_cached_tokens, "prefixes of the shard before are still there"


def runner_of(
    plan_dir: Path,
    on_done: Callable[[ShardManifest], None],
    *,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: bool = False,
) -> ShardRunner:
    return ShardRunner(plan_dir, None, should_stop=lambda: should_stop, on_done=on_done, on_progress=on_progress)


def test_a_shard_begins_beside_the_last_long_output_of_the_one_before(llama: Path, tmp_path: Path) -> None:
    """Each is published when its own last completion is there, with metrics and counts of its own."""
    shards = [requests_of(number, NUM_REQUESTS, has_long=number == 0) for number in range(NUM_SHARDS)]
    plan_dir = write_shards(tmp_path / "together/plan", llama, shards, max_num_seqs=8)
    done: list[ShardManifest] = []
    told: list[Progress] = []
    runner_of(plan_dir, done.append, on_progress=told.append).run(GivenOrders(range(NUM_SHARDS)))
    assert [manifest.shard for manifest in done] == [1, 2, 0]
    begun = [message.shard for message in told].index(1)
    beside = [message.tokens_per_second for message in told[:begun] if message.shard == 0 and message.done > 0]
    assert beside[-1] == 0, "its steps count for the other one"
    assert told[-1].shard == 0 and told[-1].done == NUM_REQUESTS and told[-1].tokens_per_second > 0
    alone = run_alone(write_shards(tmp_path / "alone/plan", llama, shards, max_num_seqs=8))
    assert results(plan_dir) == results(tmp_path / "alone/plan")
    for manifest in done:
        folder = plan_dir.parent / f"completions/shard-{manifest.shard:05d}"
        steps = pq.read_table(folder / "metrics.parquet").to_pydict()
        assert steps["step"] == list(range(manifest.num_steps))
        assert steps["started_seconds"][0] == 0.0 and steps["num_waiting"][-1] == 0
        assert manifest.seconds == pytest.approx(sum(steps["step_seconds"]))
        assert sum(steps["num_prefill_tokens"]) + sum(steps["num_cached_tokens"]) == manifest.num_prompt_tokens
        assert sum(steps["num_cached_tokens"]) == manifest.num_cached_tokens
        assert manifest.num_succeeded == NUM_REQUESTS
    num_steps = sum(manifest.num_steps for manifest in done)
    assert num_steps < alone[0].num_steps + alone[1].num_steps, "the others ran beside it"


def test_no_shard_is_asked_for_before_half_of_one_is_through(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All requests of a shard run at one time; the next one is left to whoever has less to do."""
    monkeypatch.setattr(shard_attempt, "_PROGRESS_SECONDS", 0.0)
    requests = requests_of(0, NUM_REQUESTS, has_long=True)
    for request in requests[1:]:
        request["max_tokens"] = 2 + request["row_index"]
    plan_dir = write_shards(tmp_path / "plan", llama, [requests, *equal_shards(2, NUM_REQUESTS)[1:]])
    told: list[Progress] = []
    done_at_first_poll: list[int] = []

    class Orders(GivenOrders):
        def poll(self) -> int | None:
            done_at_first_poll.append(told[-1].done)
            return super().poll()

    orders = Orders([0, 1])
    runner_of(plan_dir, lambda _: None, on_progress=told.append).run(orders)
    assert done_at_first_poll[0] == NUM_REQUESTS // 2
    assert len(results(plan_dir)) == 2 * NUM_REQUESTS


def add_learning(plan_dir: Path) -> None:
    """Let the plan say that no length is known: all requests are alike."""
    known = {"classes": [], "num_tokens": [], "is_cut_off": [], "prefix_readers": 2.0, "seconds_per_kv_token": 1.0}
    known |= {"seconds_per_layer_token": 1.0, "seconds_per_sampled_token": 1.0}
    for path in (plan_dir / "shards").iterdir():
        table = pq.read_table(path)
        prompts = [len(prompt) for prompt in table.column("prompt_token_ids").to_pylist()]
        for name, values in {"length_classes": [[0]] * len(table), "num_prompt_tokens": prompts}.items():
            place = table.schema.get_field_index(name)
            table = table.set_column(place, name, pa.array(values, table.schema.field(name).type))
        pq.write_table(table.replace_schema_metadata({LEARNING_KEY: json.dumps(known)}), path)


def test_lengths_are_learnt_beside_requests_of_another_shard(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = [requests_of(number, 12, max_tokens=60, has_long=number == 0) for number in range(2)]
    plan_dir = write_shards(tmp_path / "together/plan", llama, shards, max_num_seqs=8)
    add_learning(plan_dir)
    revise, revised = LengthLearner.revise, set()

    def see(learner: LengthLearner, running: Any, num_produced: Any) -> Any:
        expected = revise(learner, running, num_produced)
        revised.update(running.tolist())
        assert (expected > num_produced).all()
        return expected

    monkeypatch.setattr(LengthLearner, "revise", see)
    runner_of(plan_dir, lambda _: None).run(GivenOrders([0, 1]))
    assert max(revised) >= 12, "one of another shard, which has its place behind this one's"
    run_alone(write_shards(tmp_path / "alone/plan", llama, shards, max_num_seqs=8))
    assert results(plan_dir) == results(tmp_path / "alone/plan")


def test_finished_shards_load_no_model(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_dir = write_shards(tmp_path / "plan", llama, equal_shards(NUM_SHARDS, NUM_REQUESTS))
    done = run_alone(plan_dir)
    monkeypatch.setattr(LLMEngine, "__init__", None)
    told: list[ShardManifest] = []
    runner_of(plan_dir, told.append, should_stop=True).run(GivenOrders(range(NUM_SHARDS)))
    assert told == done


def test_finished_shards_are_passed_over_beside_one_that_runs(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = [requests_of(number, NUM_REQUESTS, has_long=number == 0)[::-1] for number in range(NUM_SHARDS)]
    plan_dir = write_shards(tmp_path / "plan", llama, shards)
    open_source, positions = ShardRunner._open_source, []

    def see(runner: ShardRunner, shard: int, guests: Sequence[Request]) -> Any:
        source = open_source(runner, shard, guests)
        positions.append([guest.position for guest in guests])
        return source

    monkeypatch.setattr(ShardRunner, "_open_source", see)
    run_shard(plan_dir, 1, should_stop=lambda: False, on_progress=None)
    (tmp_path / "completions/shard-00001/shard.json").unlink()  # killed before it was written: nothing is left to run
    run_shard(plan_dir, 2, should_stop=lambda: False, on_progress=None)
    told: list[ShardManifest] = []
    runner_of(plan_dir, told.append).run(GivenOrders(range(NUM_SHARDS)))
    assert [(manifest.shard, manifest.num_resumed) for manifest in told] == [(1, NUM_REQUESTS), (2, 0), (0, 0)]
    assert positions == [[NUM_REQUESTS - 1]] * 2, "what runs keeps its place in the shard that goes on"


def test_a_shard_that_is_in_use_ends_it_when_the_others_are_through(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = [requests_of(number, NUM_REQUESTS, has_long=number == 0) for number in range(2)]
    plan_dir = write_shards(tmp_path / "plan", llama, shards, max_num_seqs=8)
    monkeypatch.setattr(shard_folder, "STOP_SECONDS", 0.0)
    store = LocalStore(tmp_path / "completions/shard-00001")
    told: list[ShardManifest] = []
    with lease.acquire_lease(store, "Shard"), pytest.raises(InUseError, match=r"shard-00001 is in use by process"):
        runner_of(plan_dir, told.append).run(GivenOrders([0, 1]))
    runner_of(plan_dir, told.append).run(GivenOrders([1]))
    assert [(manifest.shard, manifest.num_resumed) for manifest in told] == [(0, 0), (1, 0)]


def test_a_shard_that_is_in_use_waits_for_those_that_run(llama: Path, tmp_path: Path) -> None:
    """The requests that run don't wait for it: another shard takes its place beside them."""
    shards = [requests_of(number, NUM_REQUESTS, has_long=number == 0) for number in range(NUM_SHARDS)]
    plan_dir = write_shards(tmp_path / "plan", llama, shards)
    held = lease.acquire_lease(LocalStore(tmp_path / "completions/shard-00001"), "Shard")
    told: list[int] = []

    def on_done(manifest: ShardManifest) -> None:
        told.append(manifest.shard)
        if manifest.shard == 0:
            held.__exit__()

    runner_of(plan_dir, on_done).run(GivenOrders(range(NUM_SHARDS)))
    assert told == [2, 0, 1]


def wait_until(is_so: Callable[[], bool], is_running: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not is_so():
        assert is_running() and time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("moment", ["shard-00000/shard.json", "shard-00001/part-*"])
def test_killed_beside_another_shard_it_loses_and_repeats_nothing(llama: Path, tmp_path: Path, moment: str) -> None:
    """At the second moment a request of the first shard still runs."""
    is_beside = "00001" in moment
    shards = [requests_of(number, MANY, has_long=is_beside and number == 0) for number in range(NUM_SHARDS)]
    plan_dir = write_shards(tmp_path / "plan", llama, shards, max_num_seqs=8)
    process = forked.start(order, plan_dir, b"0\n1\n2\n")
    wait_until(lambda: any((tmp_path / "completions").glob(moment)), process.is_alive)
    forked.kill(process)
    before = results(plan_dir)
    assert len(before) < MANY * NUM_SHARDS and (0 in before) == (not is_beside)
    assert [manifest.shard for manifest in manifests(plan_dir)] == ([] if is_beside else [0])
    told: list[ShardManifest] = []
    runner_of(plan_dir, told.append).run(GivenOrders(range(NUM_SHARDS)))
    assert sum(manifest.num_resumed for manifest in told) + (0 if is_beside else MANY) == len(before)
    assert before.items() <= results(plan_dir).items() and len(results(plan_dir)) == MANY * NUM_SHARDS


def test_a_dead_parent_stops_all_that_runs(
    llama: Path, tmp_path: Path, stdin: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The end of stdin while two shards run: what is finished is kept of both, and no other shard begins."""
    shards = [requests_of(number, MANY, has_long=number == 0) for number in range(2)]
    plan_dir = write_shards(tmp_path / "plan", llama, shards, max_num_seqs=8)
    os.write(stdin, b"0\n1\n")

    def die() -> None:
        wait_until(lambda: any(tmp_path.glob("completions/shard-00001/part-*")), lambda: True)
        os.close(stdin)

    parent = threading.Thread(target=die)
    parent.start()
    assert main(["--stop-at-eof", str(plan_dir)]) == 130
    parent.join()
    assert MANY <= len(results(plan_dir)) < 2 * MANY and not manifests(plan_dir)
    said = f"Shard 0 was asked to stop with {MANY - 1} of {MANY} requests finished. Shard 1 was asked to stop with"
    assert said in capsys.readouterr().err


def test_a_stop_between_two_shards_ends_it(llama: Path, tmp_path: Path) -> None:
    """It waits for the next shard's number when the signal comes."""
    plan_dir = write_shards(tmp_path / "plan", llama, equal_shards(2, NUM_REQUESTS))
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
    plan_dir = write_shards(tmp_path / "plan", llama, equal_shards(2, NUM_REQUESTS))
    os.write(stdin, b"first\n")
    os.close(stdin)
    assert main([str(plan_dir)]) == PlanError.exit_status
    assert "Expected the number of a shard as a line of stdin, got b'first" in capsys.readouterr().err
    with pytest.raises(PlanError, match=r"has no shard 7. Expected 0 to 1\."):
        runner_of(plan_dir, lambda _: None).run(GivenOrders([7]))


@pytest.mark.parametrize(("max_in_flight", "spec"), [(2, {"num_blocks": 28}), (1, {"prefix_cache": False})], ids=str)
def test_sources_follow_one_another_in_one_engine(llama: Path, max_in_flight: int, spec: dict[str, Any]) -> None:
    """Beside a full cache too, where requests of an earlier source are preempted after the next one has begun."""
    sources = [requests_of(number, NUM_REQUESTS, max_tokens=20, has_long=True) for number in range(NUM_SHARDS)]
    sources = [[{**request, "estimated_output_tokens": 4} for request in source] for source in sources]
    alone = run_engine(make_engine(llama, ENDLESS), list(chain.from_iterable(sources))).completions
    engine = make_engine(llama, ENDLESS, max_in_flight=max_in_flight, max_num_seqs=6, **spec)
    waiting, completions, finished = list(sources[1:]), {}, []
    guests: list[Request] = []

    def open_next(running: Sequence[Request]) -> ListSource:
        guests.extend(running)
        return ListSource(waiting.pop(0), is_two_ended=True)

    def on_finished(completion: Completion) -> None:
        assert completion.row_index not in completions
        completions[completion.row_index] = completion.token_ids
        finished.append(completion.row_index // 1000)

    engine.run(
        ListSource(sources[0], is_two_ended=True),
        on_finished=on_finished,
        on_step=lambda _: None,
        should_stop=lambda: False,
        next_source=lambda: open_next if waiting else None,
    )
    assert completions == {row: completion.token_ids for row, completion in alone.items()}
    assert finished != sorted(finished)
    assert any(guest.num_preemptions for guest in guests) == ("num_blocks" in spec)
