"""A shard's completions folder: part files that only ever appear whole, metrics, shard.json last, and who is at work.

completions/shard-00000/  part-*.parquet  steps-*.parquet  metrics.parquet  shard.json  leases/

A part's name starts with the attempt that wrote it. Which parts count is what the lease says: see `blendserve.lease`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from blendserve.engine.request import Completion, FinishReason
from blendserve.engine.step_metrics import StepMetrics, ended_seconds, metrics_table
from blendserve.errors import OutputError
from blendserve.file_store import open_store
from blendserve.lease import Lease, acquire_lease
from blendserve.manifest import ShardManifest
from blendserve.schemas import COMPLETIONS, STEP_METRICS

# An engine that was told to stop still writes out what it finished: that takes seconds.
STOP_SECONDS = 20.0
_PART_COMPLETIONS = 64
_PART_SECONDS = 2.0
_METRICS_SECONDS = 30.0
_COUNTED = ["row_index", "finish_reason", "num_prompt_tokens", "num_cached_tokens", "num_completion_tokens"]
_MANIFEST = "shard.json"


class ShardFolder:
    """The folder of one shard, local or on an object store. Only within `locked()` may it be changed."""

    def __init__(self, place: Path | str) -> None:
        self.place = place
        self._store = open_store(place)
        self._lease: Lease | None = None
        self._num_written = 0

    @contextmanager
    def locked(self, *, is_waiting: bool = True) -> Iterator[None]:
        """Keep every other process out. is_waiting: for one that is in, or may be, to end.

        Raises InUseError when one is in, OutputError when the folder can't be written.
        """
        wait_seconds = STOP_SECONDS if is_waiting else None
        with _reporting_full_disk(self.place):
            self._lease = acquire_lease(self._store, f"Shard folder {self.place}", wait_seconds=wait_seconds)
        with self._lease:
            yield

    @property
    def is_lost(self) -> bool:
        """Whether another process was seen to have taken over."""
        return self._held.is_lost

    def read_manifest(self) -> ShardManifest | None:
        """`shard.json`, or None as long as the shard isn't done."""
        content = self._store.read(_MANIFEST)
        return None if content is None else ShardManifest.model_validate_json(content)

    def remove_manifest(self) -> None:
        self._held.check()
        self._store.remove(_MANIFEST)

    def take_over(self) -> None:
        """Go on from what earlier attempts left, but for rows that failed, which run again.

        Parts stay as they are for whoever reads them; what is kept of one with failed rows becomes a part of ours. What
        a killed attempt left half-written is removed.
        """
        self._store.remove_unfinished()
        kept = []
        for name in self._held.inherited("part-"):
            table = self._read(name, COMPLETIONS)
            succeeded = table.filter(pc.field("finish_reason") != FinishReason.ERROR.value)
            if succeeded.num_rows == table.num_rows:
                kept.append(name)
            elif succeeded.num_rows:
                self._write_numbered("part", succeeded)
        self._held.take_over([*kept, *self._held.inherited("steps-")])

    def read_counts(self) -> pa.Table:
        """row_index, finish_reason and token counts of all completions that count."""
        schema = pa.schema([COMPLETIONS.field(name) for name in _COUNTED])
        return pa.concat_tables([schema.empty_table(), *(self._read(name, schema) for name in self._names("part-"))])

    def write_part(self, completions: Sequence[Completion]) -> None:
        """Write one more part file.

        Raises OutputError when the disk is full, InUseError when another process has taken over; earlier parts stay.
        """
        self._write_numbered("part", _completions_table(completions))

    def write_steps(self, steps: Sequence[StepMetrics]) -> None:
        """Keep the metrics of some steps, so that the shard's metrics hold those of an attempt that was killed too."""
        self._write_numbered("steps", metrics_table(steps))

    def write_metrics(self) -> pa.Table:
        """Join the steps of all attempts, one after the other, in `metrics.parquet`, and return them."""
        attempts: dict[str, list[pa.Table]] = {}
        for name in self._names("steps-"):
            attempts.setdefault(name.rpartition("-")[0], []).append(self._read(name, STEP_METRICS))
        joined = STEP_METRICS.empty_table()
        for tables in attempts.values():
            joined = pa.concat_tables([joined, _after(joined, pa.concat_tables(tables))])
        self._write("metrics.parquet", joined)
        return joined

    def publish(self, manifest: ShardManifest) -> None:
        """Declare the shard done: what counts now counts for good. Raises InUseError when another process took over."""
        steps = self._names("steps-")
        with _reporting_full_disk(self.place):
            self._held.close([*self._names("part-"), *steps])  # the steps until they are removed below
            self._store.write(_MANIFEST, (manifest.model_dump_json(indent=2) + "\n").encode())
            for name in steps:
                self._store.remove(name)

    @property
    def _held(self) -> Lease:
        if self._lease is None:
            raise RuntimeError("a shard's folder is changed within locked() only")
        return self._lease

    def _names(self, prefix: str) -> list[str]:
        return self._held.counted(self._store.names(prefix))

    def _read(self, name: str, schema: pa.Schema) -> pa.Table:
        return pq.read_table(pa.BufferReader(self._store.read(name)), columns=schema.names).cast(schema)

    def _write_numbered(self, kind: str, table: pa.Table) -> None:
        self._write(f"{kind}-{self._held.attempt}-{self._num_written:05d}.parquet", table)
        self._num_written += 1

    def _write(self, name: str, table: pa.Table) -> None:
        with _reporting_full_disk(self.place):
            self._held.check()
            sink = pa.BufferOutputStream()
            pq.write_table(table, sink, compression="zstd")
            self._store.write(name, sink.getvalue().to_pybytes())


def _after(earlier: pa.Table, steps: pa.Table) -> pa.Table:
    """`steps` with numbers and times that go on where `earlier` ends."""
    if not earlier.num_rows:
        return steps
    offsets = {"step": earlier.num_rows, "started_seconds": ended_seconds(earlier)}
    for name, offset in offsets.items():
        position = STEP_METRICS.get_field_index(name)
        steps = steps.set_column(position, STEP_METRICS.field(name), pc.add(steps.column(name), offset))
    return steps


class CompletionWriter:
    """Collects completions and writes them every 64 of them or every 2 seconds, so that a crash loses little.

    The metrics of the steps go along every 30 seconds.
    """

    def __init__(self, folder: ShardFolder) -> None:
        self._folder = folder
        self._pending: list[Completion] = []
        self._steps: list[StepMetrics] = []
        self._written_at = self._steps_written_at = time.monotonic()

    def add(self, completion: Completion) -> None:
        self._pending.append(completion)

    def add_step(self, metrics: StepMetrics) -> None:
        self._steps.append(metrics)

    def write_due(self) -> None:
        """Write what is many or old enough; to be called after every step."""
        now = time.monotonic()
        if self._pending and (now - self._written_at >= _PART_SECONDS or len(self._pending) >= _PART_COMPLETIONS):
            self._flush_completions()
        if now - self._steps_written_at >= _METRICS_SECONDS:
            self._flush_steps()

    def flush(self) -> None:
        """Write what is pending, if anything is."""
        self._flush_completions()
        self._flush_steps()

    def _flush_completions(self) -> None:
        if self._pending:
            self._folder.write_part(self._pending)
            self._pending = []
        self._written_at = time.monotonic()

    def _flush_steps(self) -> None:
        if self._steps:
            self._folder.write_steps(self._steps)
            self._steps = []
        self._steps_written_at = time.monotonic()


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
def _reporting_full_disk(folder: Path | str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{folder} can't be written: {error}. Finished completions in it are safe; make room or fix the "
            "permissions, then run the shard again."
        ) from error
