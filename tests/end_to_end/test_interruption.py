"""A job that is killed or stopped at any moment goes on where it was and ends as if nothing had happened."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from blendserve.cli import main
from tests import forked
from tests.end_to_end.command_line import (
    Blendserve,
    completions,
    generated_row_indices,
    job_options,
    run_engines_here,
    write_requests,
)


def run_here(arguments: list[str], has_engine_process: bool = False) -> None:
    """The command, for a process that is killed whole; its engine in a process of its own, or in the same."""
    with pytest.MonkeyPatch.context() as patch:
        if not has_engine_process:
            run_engines_here(patch)
        patch.setattr(sys, "argv", ["blendserve", "run", *arguments])
        main()


def wait_for(path: Path, pattern: str, is_running: Callable[[], bool]) -> None:
    """Until the job has written a file that matches, so that a moment is chosen by state and not by the clock."""
    for _ in range(6000):
        if any(path.glob(pattern)) or not is_running():
            return
        time.sleep(0.01)
    raise AssertionError(f"{pattern} never appeared")


@pytest.fixture
def options(requests: Path, tmp_path: Path, tiny_model: Path) -> list[object]:
    return [*job_options(requests, tmp_path / "out", tiny_model), "--shards", 2, "--max-num-seqs", 2]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    write_requests(folder / "requests.parquet")
    options = job_options(folder / "requests.parquet", folder / "out", tiny_model)
    process = forked.start(run_here, list(map(str, options)))
    process.join()
    assert process.exitcode == 0
    return completions(folder / "out")


MOMENTS = {
    "at the start": "job.json",
    "after extraction": "work/requests.parquet",
    "after analysis": "work/prefix_nodes.parquet",
    "in the sample": "completions/sample/shard-00000",
    "after the plan": "plan/plan.json",
    "in the first shard": "completions/shard-00000/part-*.parquet",
    "in the second shard": "completions/shard-00001",
    "in the merge": ".results.*.tmp",
}
HAS_ENGINE_PROCESS = {"in the first shard", "in the second shard"}


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_9(
    moment: str, options: list[object], tmp_path: Path, blendserve: Blendserve, uninterrupted: dict[str, str]
) -> None:
    process = forked.start(run_here, list(map(str, options)), moment in HAS_ENGINE_PROCESS)
    wait_for(tmp_path / "out", MOMENTS[moment], process.is_alive)
    forked.kill(process)
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    before = generated_row_indices(tmp_path / "out")
    done = blendserve("run", *options)
    assert done.status == 0, done.stderr
    assert completions(tmp_path / "out") == uninterrupted
    after = generated_row_indices(tmp_path / "out")
    assert sorted(after) == sorted(set(after))
    assert set(before) <= set(after)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_request_keeps_what_is_finished(
    number: signal.Signals, options: list[object], tmp_path: Path, blendserve: Blendserve, uninterrupted: dict[str, str]
) -> None:
    process = forked.start(run_here, list(map(str, options)), True, output=tmp_path / "output.txt")
    wait_for(tmp_path / "out", "completions/shard-00000", process.is_alive)
    os.kill(process.pid or 0, number)
    process.join(60)
    output = (tmp_path / "output.txt").read_text()
    assert process.exitcode == 130, output
    assert "run the same command again to go on" in output
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    assert not list((tmp_path / "out").rglob("*.tmp"))
    done = blendserve("run", *options)
    assert done.status == 0, done.stderr
    assert completions(tmp_path / "out") == uninterrupted
    generated = generated_row_indices(tmp_path / "out")
    assert len(generated) == len(set(generated))


def test_when_only_the_command_is_killed_its_engine_ends_too(
    options: list[object], tmp_path: Path, blendserve: Blendserve, uninterrupted: dict[str, str]
) -> None:
    process = forked.start(run_here, list(map(str, options)), True)
    wait_for(tmp_path / "out", "completions/shard-00000", process.is_alive)
    process.kill()
    process.join()
    done = blendserve("run", *options)
    assert done.status == 0, done.stderr
    assert completions(tmp_path / "out") == uninterrupted
    generated = generated_row_indices(tmp_path / "out")
    assert len(generated) == len(set(generated))


def test_two_runs_of_one_job_at_once(options: list[object], tmp_path: Path, blendserve: Blendserve) -> None:
    process = forked.start(run_here, list(map(str, options)))
    wait_for(tmp_path / "out", "job.json", process.is_alive)
    second = blendserve("run", *options)
    process.join()
    assert process.exitcode == 0
    assert second.status == 75
    assert "in use by process" in second.result["error"]
