"""How the end-to-end tests call the `blendserve` command and read what it leaves."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from blendserve import gpus, job
from blendserve.engine.run_shard import GivenOrders, run_shard
from blendserve.engine.shard_runner import ShardRunner
from blendserve.manifest import ShardManifest

NUM_ROWS = 48
INSTRUCTION = "Read the text and answer with one word, yes or no. Example: the sun is hot, yes. "


@dataclass(frozen=True, slots=True)
class Finished:
    """What a command left: its exit status, stdout, stderr, and the JSON object of its last line."""

    status: int
    stdout: str
    stderr: str

    @property
    def result(self) -> dict[str, Any]:
        result: dict[str, Any] = json.loads(self.stdout.splitlines()[-1])
        return result


Blendserve = Callable[..., Finished]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", "from blendserve.cli import main; main()", *map(str, arguments)]


def job_options(requests: Path, output: Path, model: Path) -> list[object]:
    options: list[object] = ["--input", requests, "--output", output, "--model", model]
    return [*options, "--id-column", "id", "--prompt-column", "ask", "--json"]


def write_requests(path: Path) -> None:
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
    pq.write_table(pa.Table.from_pylist(rows), path)


def results(output: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pads.dataset(output / "results", format="parquet").to_table().to_pylist()
    return rows


def completions(output: Path) -> dict[str, str]:
    return {row["request_id"]: row["completion"] for row in results(output)}


def generated_row_indices(output: Path) -> list[int]:
    """The row of every completion that any attempt wrote."""
    files = sorted((output / "completions").rglob("part-*.parquet"))
    return [index for file in files for index in pq.read_table(file, columns=["row_index"])["row_index"].to_pylist()]


def run_engines_here(patch: pytest.MonkeyPatch) -> None:
    """Let the engine run in the process that asks for it: all the same code but for the process boundary."""
    patch.setattr(job, "run_shard_process", _run_shard_here)
    patch.setattr(gpus, "run_shards_process", _run_shards_here)


def _run_shard_here(plan_folder: Path, shard: int, **_callbacks: object) -> ShardManifest:
    return run_shard(plan_folder, shard, should_stop=lambda: False, on_progress=None)


def _run_shards_here(
    plan_folder: Path,
    next_shard: Callable[[], int | None],
    on_done: Callable[[ShardManifest], None],
    **_callbacks: object,
) -> None:
    runner = ShardRunner(plan_folder, None, should_stop=lambda: False, on_done=on_done, on_progress=None)
    runner.run(GivenOrders(iter(next_shard, None)))
