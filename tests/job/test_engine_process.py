"""Watching an engine's process: which shards it gets, what it says of them, and whose failure its end is."""

from __future__ import annotations

import logging
from pathlib import Path

import psutil
import pytest

from blendserve import engine_process
from blendserve.engine_process import Progress, run_shard_process, run_shards_process
from blendserve.errors import (
    BlendServeError,
    EngineOutOfMemoryError,
    EngineProcessError,
    InUseError,
    PlanError,
    StoreUnreachableError,
)
from blendserve.errors import Interrupted as Stopped
from blendserve.manifest import PlanManifest, ShardManifest, write_manifest
from blendserve.spec import EngineSpec, SamplingSpec

# In the place of the engine. It runs the shard of its command line, or asks for one after the other; what a shard does
# lies in a file of the shard's number.
ENGINE = """
import json, os, sys, time
plan = next(argument for argument in sys.argv[1:] if os.path.isdir(argument) and "completions" not in argument)
tell = lambda **message: print(json.dumps(message), file=sys.stderr, flush=True)
def run(shard):
    tell(event="progress", shard=shard, done=0, total=1)
    path = f"{plan}/{shard}.py"
    if os.path.exists(path):
        exec(open(path).read())
    zeros = dict.fromkeys(%r, 0)
    manifest = {**zeros, "plan_id": "p", "shard": shard, "status": "done", "device": str(os.getpid()), "versions": {}}
    tell(event="done", manifest=manifest)
if sys.argv[-1].isdigit():
    run(int(sys.argv[-1]))
else:
    tell(event="next")
    for line in sys.stdin:
        run(int(line))
        tell(event="next")
"""
COUNTS = [
    name for name, field in ShardManifest.model_fields.items() if field.annotation in (int, float) and name != "shard"
]


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plan's folder; engines that are started run `ENGINE`."""
    package = tmp_path / "blendserve/engine"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "run_shard.py").write_text(ENGINE % COUNTS)
    monkeypatch.chdir(tmp_path)  # `python -m` looks there first
    made = PlanManifest(
        plan_id="p",
        policy="blend",
        is_two_ended=True,
        model="m",
        hardware="cpu",
        sampling=SamplingSpec(),
        engine=EngineSpec(),
        completions="../completions",
        shards=(),
        summary={},
    )
    write_manifest(tmp_path / "plan/plan.json", made)
    return tmp_path / "plan"


def run_all(plan: Path, num_shards: int = 3) -> list[ShardManifest]:
    done: list[ShardManifest] = []
    waiting = iter(range(num_shards))
    run_shards_process(plan, lambda: next(waiting, None), done.append)
    return done


def test_one_process_takes_one_shard_after_the_other(plan: Path) -> None:
    done, told = [], list[Progress]()
    waiting = iter([4, 0, 7])

    def next_shard() -> int | None:
        assert len(done) in (0, 1, 2, 3)
        return next(waiting, None)

    run_shards_process(plan, next_shard, done.append, on_progress=told.append)
    assert [manifest.shard for manifest in done] == [4, 0, 7] == [message["shard"] for message in told]
    assert len({manifest.device for manifest in done}) == 1, "of one process"
    assert run_shard_process(plan, 4).device != done[0].device


NEXT_BESIDE = "tell(event='next'); run(int(sys.stdin.readline()))"  # another shard begins and ends meanwhile


def test_it_may_ask_for_the_next_shard_before_one_is_through(plan: Path) -> None:
    (plan / "0.py").write_text(NEXT_BESIDE)
    assert [manifest.shard for manifest in run_all(plan)] == [1, 0, 2]


def test_stdin_stays_open_until_all_is_through(plan: Path) -> None:
    """Its end would mean that the parent is dead."""
    (plan / "0.py").write_text("import select\ntell(event='next')\nassert not select.select([0], [], [], 0.3)[0]")
    assert len(run_all(plan, 1)) == 1


def test_a_failure_is_of_all_shards_that_ran(plan: Path) -> None:
    (plan / "0.py").write_text(NEXT_BESIDE)
    (plan / "1.py").write_text("os.kill(os.getpid(), 9)")
    with pytest.raises(EngineOutOfMemoryError, match=r"^Shard 0 and shard 1 of .* ran out of memory, or was killed"):
        run_all(plan)


def test_no_shards_at_all(plan: Path) -> None:
    assert run_all(plan, 0) == []


@pytest.mark.parametrize(
    ("end", "kind", "text"),
    [
        ("os.kill(os.getpid(), 9)", EngineOutOfMemoryError, "Shard 1 of .* ran out of memory, or was killed"),
        ("sys.exit('torch.OutOfMemoryError: no')", EngineOutOfMemoryError, "Shard 1 of .* ran out of memory"),
        ("sys.exit('what')", EngineProcessError, "Shard 1 of .* ended with status 1(.|\n)*what$"),
        ("sys.exit(0)", EngineProcessError, "Shard 1 of .* ended with status 0(.|\n)*it wrote nothing"),
        ("print('no file', file=sys.stderr); sys.exit(2)", PlanError, "^Shard 1 can't run: no file$"),
        ("print('x is in use', file=sys.stderr); sys.exit(75)", InUseError, "^x is in use$"),
        ("print('s3 is silent', file=sys.stderr); sys.exit(69)", StoreUnreachableError, "^s3 is silent$"),
        ("sys.exit(130)", Stopped, "^Shard 1 was stopped"),
    ],
)
@pytest.mark.parametrize("is_alone", [False, True])
def test_a_failure_is_of_the_shard_that_ran(
    plan: Path, end: str, kind: type[BlendServeError], text: str, is_alone: bool
) -> None:
    (plan / "0.py").write_text("print('MemoryError: of an earlier shard', file=sys.stderr)")
    (plan / "1.py").write_text(end)
    with pytest.raises(kind, match=text) as raised:
        run_shard_process(plan, 1) if is_alone else run_all(plan)
    assert raised.type is kind


def test_it_may_die_before_it_takes_its_shard(plan: Path) -> None:
    engine = plan.parent / "blendserve/engine/run_shard.py"
    engine.write_text('import sys; sys.stderr.write(\'{"event": "next"}\\nno model\\n\'); sys.exit(1)')
    with pytest.raises(EngineProcessError, match=r"Shard 0 of .* ended with status 1(.|\n)*no model"):
        run_all(plan)


def test_a_stop_ends_the_process(plan: Path) -> None:
    (plan / "1.py").write_text("time.sleep(60)")
    done: list[ShardManifest] = []
    started: list[Progress] = []
    waiting = iter(range(3))
    with pytest.raises(Stopped, match=r"Shard 1 was stopped\. What is finished is kept"):
        run_shards_process(
            plan,
            lambda: next(waiting, None),
            done.append,
            on_progress=started.append,
            should_stop=lambda: len(started) == 2,
        )
    assert [manifest.shard for manifest in done] == [0] and next(waiting) == 2


def test_a_hung_process_is_killed_when_it_does_not_stop(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_process, "_STOP_SECONDS", 0.2)
    hung = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntell(event='progress', shard=1)\n"
    (plan / "1.py").write_text(hung + "time.sleep(8)")
    started: list[Progress] = []
    with pytest.raises(Stopped, match=r"Shard 1 was stopped\. What is finished is kept"):
        run_shard_process(plan, 1, on_progress=started.append, should_stop=lambda: len(started) == 2)


def test_what_keeps_stderr_open_does_not_keep_the_process_going(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child of the engine's process may outlive it, and has its stderr."""
    monkeypatch.setattr(engine_process, "_REST_SECONDS", 0.2)
    command = "[sys.executable, '-S', '-c', 'import time; time.sleep(8)']"
    (plan / "0.py").write_text(f"import subprocess\ntell(event='progress', pid=subprocess.Popen({command}).pid)")
    told: list[Progress] = []
    run_shard_process(plan, 0, on_progress=told.append)
    child = psutil.Process(told[-1]["pid"])
    is_running = child.status() != psutil.STATUS_ZOMBIE
    child.kill()
    assert is_running


def test_what_an_engine_says_is_logged(plan: Path, caplog: pytest.LogCaptureFixture) -> None:
    (plan / "0.py").write_text("""print('hello\\n{"event": "completion"}\\n{not json', file=sys.stderr)""")
    caplog.set_level(logging.INFO)
    run_all(plan, 1)
    assert caplog.messages == ["hello", '{"event": "completion"}', "{not json"]
