"""How the end-to-end tests call the `blendserve` command and read what it leaves."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.dataset as pads
import pyarrow.parquet as pq

NUM_ROWS = 48


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


def results(output: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pads.dataset(output / "results", format="parquet").to_table().to_pylist()
    return rows


def completions(output: Path) -> dict[str, str]:
    return {row["request_id"]: row["completion"] for row in results(output)}


def generated_row_indices(output: Path) -> list[int]:
    """The row of every completion that any attempt wrote."""
    files = sorted((output / "completions").rglob("part-*.parquet"))
    return [index for file in files for index in pq.read_table(file, columns=["row_index"])["row_index"].to_pylist()]
