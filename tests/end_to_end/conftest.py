"""The `blendserve` command as a user runs it, on an input that a tiny model handles in seconds."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from blendserve import job
from blendserve.cli import app
from blendserve.engine.run_shard import run_shard
from blendserve.manifest import ShardManifest
from tests.end_to_end.command_line import NUM_ROWS, Blendserve, Finished, command

INSTRUCTION = "Read the text and answer with one word, yes or no. Example: the sun is hot, yes. "


@pytest.fixture
def blendserve_process() -> Blendserve:
    """The command in a process of its own, and the engine in another: the real thing, at seconds a call."""

    def call(*arguments: object) -> Finished:
        done = subprocess.run(command(*arguments), capture_output=True, text=True, check=False, timeout=240)
        return Finished(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture
def blendserve(monkeypatch: pytest.MonkeyPatch) -> Blendserve:
    """The command in the test's own process, the engine too: all the same code but for the process boundary."""
    monkeypatch.setattr(job, "run_shard_process", _run_shard_here)

    def call(*arguments: object, cwd: Path | None = None) -> Finished:
        if cwd is not None:
            monkeypatch.chdir(cwd)
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        return Finished(done.exit_code, done.stdout, done.stderr)

    return call


def _run_shard_here(plan_folder: Path, shard: int, **_callbacks: object) -> ShardManifest:
    return run_shard(plan_folder, shard, should_stop=lambda: False, on_progress=None)


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    """Rows of two kinds: short answers under one long instruction, long answers to short prompts; four duplicates."""
    rows = []
    for number in range(NUM_ROWS):
        text = f"{INSTRUCTION}Number {number % 44} is even." if number % 2 else f"Tell me of {number}."
        rows.append(
            {
                "id": f"row-{number}",
                "ask": text,
                "max_tokens": 3 if number % 2 else 40,
                "topic": {"name": f"t{number}", "tags": ["a"] * (number % 3)},
            }
        )
    path = tmp_path / "requests.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path
