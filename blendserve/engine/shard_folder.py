"""A shard's completions folder: part files that only ever appear whole, a lock, metrics, and shard.json last.

completions/shard-00000/  part-*.parquet  metrics.parquet  shard.json  .lock
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from blendserve.engine.request import Completion, FinishReason
from blendserve.engine.step_metrics import StepMetrics, metrics_table
from blendserve.errors import OutputError
from blendserve.manifest import replacing
from blendserve.schemas import COMPLETIONS

LOCK_SECONDS = 20.0
_PART_COMPLETIONS = 64
_PART_SECONDS = 2.0
_COUNTED = ["row_index", "finish_reason", "num_prompt_tokens", "num_cached_tokens", "num_completion_tokens"]


class ShardFolder:
    """The folder of one shard. Hold `locked()` while reading and writing it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._next_part: int | None = None  # known after the first write

    @property
    def manifest(self) -> Path:
        return self.path / "shard.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process out. Raises OutputError when one is in, or when the folder can't be written."""
        with _reporting_full_disk(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        with lock:
            # An engine that was told to stop still writes out what it finished: that takes seconds.
            deadline = time.monotonic() + LOCK_SECONDS
            while not _try_lock(lock):
                if time.monotonic() >= deadline:
                    raise OutputError(
                        f"{self.path} is in use: another process is running this shard. Wait for it, or stop it first."
                    )
                time.sleep(0.1)
            yield

    def clean_up(self) -> None:
        """Remove what a killed attempt left half-written, and failed rows, so that they run again."""
        for path in self.path.glob(".*.tmp"):
            path.unlink()
        for path in self._parts():
            table = pq.read_table(path, schema=COMPLETIONS)
            succeeded = table.filter(pc.field("finish_reason") != FinishReason.ERROR.value)
            if succeeded.num_rows < table.num_rows:
                self._write(path, succeeded)

    def read_counts(self) -> pa.Table:
        """row_index, finish_reason and token counts of all completions that are there."""
        tables = [pq.read_table(path, columns=_COUNTED) for path in self._parts()]
        empty = pa.schema([COMPLETIONS.field(name) for name in _COUNTED]).empty_table()
        return pa.concat_tables([empty, *tables])

    def write_part(self, completions: Sequence[Completion]) -> None:
        """Write one more part file. Raises OutputError when the disk is full; earlier parts stay as they are."""
        if self._next_part is None:
            numbers = [int(path.stem.removeprefix("part-")) for path in self._parts()]
            self._next_part = max(numbers, default=-1) + 1
        self._write(self.path / f"part-{self._next_part:05d}.parquet", _completions_table(completions))
        self._next_part += 1

    def write_metrics(self, steps: Sequence[StepMetrics]) -> None:
        self._write(self.path / "metrics.parquet", metrics_table(steps))

    def _write(self, path: Path, table: pa.Table) -> None:
        with _reporting_full_disk(self.path), replacing(path) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    def _parts(self) -> list[Path]:
        return sorted(self.path.glob("part-*.parquet"))


class CompletionWriter:
    """Collects completions and writes them every 64 of them or every 2 seconds, so that a crash loses little."""

    def __init__(self, folder: ShardFolder) -> None:
        self._folder = folder
        self._pending: list[Completion] = []
        self._written_at = time.monotonic()

    def add(self, completion: Completion) -> None:
        self._pending.append(completion)

    def flush_if_due(self) -> None:
        is_due = time.monotonic() - self._written_at >= _PART_SECONDS or len(self._pending) >= _PART_COMPLETIONS
        if self._pending and is_due:
            self.flush()

    def flush(self) -> None:
        """Write what is pending, if anything is."""
        if self._pending:
            self._folder.write_part(self._pending)
            self._pending = []
        self._written_at = time.monotonic()


def _try_lock(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _completions_table(completions: Sequence[Completion]) -> pa.Table:
    rows = [
        {
            "row_index": completion.row_index,
            "request_id": completion.request_id,
            "completion": completion.text,
            "completion_token_ids": completion.token_ids,
            "finish_reason": completion.finish_reason.value,
            "error": completion.error,
            "num_prompt_tokens": completion.num_prompt_tokens,
            "num_cached_tokens": completion.num_cached_tokens,
            "num_completion_tokens": len(completion.token_ids),
        }
        for completion in completions
    ]
    return pa.Table.from_pylist(rows, schema=COMPLETIONS)


@contextmanager
def _reporting_full_disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{folder} can't be written: {error}. Finished completions in it are safe; make room or fix the "
            "permissions, then run the shard again."
        ) from error
