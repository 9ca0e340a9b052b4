"""From completions to results: every input row exactly once, with what became of it.

The results appear under their final name only when every row is in them and the disk holds them.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq

import blendserve_sql
from blendserve.errors import ReconciliationError
from blendserve.job_folder import JobFolder
from blendserve.manifest import sync
from blendserve.planner.database import open_database, register_files
from blendserve.row_groups import FEW_ROWS, RowGroupWriter
from blendserve.schemas import COMPLETIONS, RESULT_COLUMNS

_ROWS_PER_FILE = 1024 * FEW_ROWS
_OUTCOMES = {
    "succeeded": "succeeded",
    "failed": "failed",
    "rejected": "rejected",
    "duplicate": "duplicates_resolved",
    "missing": "missing",
}


@dataclass(frozen=True, slots=True)
class MergedResults:
    """`counts`: input_rows = succeeded + failed + rejected + duplicates_resolved + missing. `tokens`: totals."""

    counts: dict[str, int]
    tokens: dict[str, int]


def merge_results(folder: JobFolder, *, allow_missing: bool, check_lease: Callable[[], None]) -> MergedResults:
    """Write `results/part-*.parquet`: the input's columns and RESULT_COLUMNS, in input order.

    Raises ReconciliationError when a row is lost or doubled, or has no completion and `allow_missing` is off, and what
    `check_lease` raises when another process has taken over the job. Nothing is published then.
    """
    for left in folder.root.glob(".results.*"):
        shutil.rmtree(left, ignore_errors=True)
    building = folder.root / f".results.{uuid.uuid4().hex[:8]}.tmp"
    building.mkdir()
    try:
        merged = _write_parts(folder, building)
        _reconcile(folder, merged.counts, allow_missing)
        for path in (*building.iterdir(), building):
            sync(path)
        check_lease()
        _publish(building, folder.results)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return merged


def _write_parts(folder: JobFolder, building: Path) -> MergedResults:
    counts = dict.fromkeys(("input_rows", *_OUTCOMES.values()), 0)
    tokens = dict.fromkeys(("num_prompt_tokens", "num_cached_tokens", "num_completion_tokens"), 0)
    with ExitStack() as last_part:
        for rows, outcomes in _joined_batches(folder):
            if counts["input_rows"] % _ROWS_PER_FILE == 0:
                last_part.pop_all().close()
                part = building / f"part-{counts['input_rows'] // _ROWS_PER_FILE:05d}.parquet"
                writer = last_part.enter_context(RowGroupWriter(part, rows.schema))
            writer.write(rows)
            counts["input_rows"] += rows.num_rows
            for entry in pc.value_counts(outcomes).to_pylist():
                counts[_OUTCOMES[entry["values"]]] += entry["counts"]
            for name in tokens:
                tokens[name] += pc.sum(rows[name]).as_py() or 0
    return MergedResults(counts, tokens)


def _publish(building: Path, results: Path) -> None:
    """Put `building` in the place of earlier results, which come back if that fails."""
    earlier = building.with_suffix(".old")
    if results.exists():
        results.rename(earlier)
    try:
        building.rename(results)
    except OSError:
        if earlier.exists():
            earlier.rename(results)
        raise
    sync(results.parent)
    shutil.rmtree(earlier, ignore_errors=True)


def _joined_batches(folder: JobFolder) -> Iterator[tuple[pa.Table, pa.ChunkedArray]]:
    """Input rows beside their results, with the outcome of each."""
    with (
        open_database(folder.work) as connection,
        pq.ParquetFile(folder.relation("input_rows")) as input_rows,
    ):
        files = [str(path) for path in folder.completion_files()]
        connection.register("completions", pads.dataset(files, schema=COMPLETIONS, format="parquet"))
        names = ("requests", "rejected_requests", "sorted_requests", "tokenized_requests")
        register_files(connection, {name: [folder.relation(name)] for name in names})
        results = connection.sql(blendserve_sql.read("results")).to_arrow_reader(FEW_ROWS)
        chunks = _rechunk(results, FEW_ROWS)
        num_rows = 0
        for inputs in _rechunk(input_rows.iter_batches(batch_size=FEW_ROWS), FEW_ROWS):
            chunk = next(chunks, None)
            if chunk is None or chunk["row_index"].to_pylist() != list(range(num_rows, num_rows + inputs.num_rows)):
                raise ReconciliationError(
                    f"Results of {folder.root} don't line up with the input from row {num_rows} on. Nothing was "
                    "published; keep the folder and report this."
                )
            _check_ids(folder, chunk)
            num_rows += inputs.num_rows
            for field in RESULT_COLUMNS:
                if field.name not in inputs.schema.names:
                    inputs = inputs.append_column(field, chunk[field.name].cast(field.type))
            yield inputs, chunk["outcome"]


def _check_ids(folder: JobFolder, results: pa.Table) -> None:
    row = pc.index(results["outcome"], "mixed up").as_py()
    if row >= 0:
        raise ReconciliationError(
            f"The completion of row {results['row_index'][row]} in {folder.root}, request "
            f"{results['request_id'][row].as_py()!r}, is of a request with another id. Completions or files of another "
            "job got into the folder. Nothing was published; run the job again with --force."
        )


def _rechunk(batches: Iterator[pa.RecordBatch], num_rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of exactly `num_rows`, the last one shorter."""
    held: list[pa.RecordBatch] = []
    num_held = 0
    for batch in batches:
        held.append(batch)
        num_held += batch.num_rows
        while num_held >= num_rows:
            table = pa.Table.from_batches(held)
            yield table.slice(0, num_rows)
            held = table.slice(num_rows).to_batches()
            num_held -= num_rows
    if num_held:
        yield pa.Table.from_batches(held)


def _reconcile(folder: JobFolder, counts: dict[str, int], allow_missing: bool) -> None:
    num_requests = pq.read_metadata(folder.relation("requests")).num_rows
    accounted = sum(counts[name] for name in _OUTCOMES.values())
    if not counts["input_rows"] == num_requests == accounted:
        raise ReconciliationError(
            f"Counts of {folder.root} don't add up: {num_requests} input rows, {counts['input_rows']} results, "
            f"{accounted} outcomes. Nothing was published; keep the folder and report this."
        )
    if counts["missing"] and not allow_missing:
        raise ReconciliationError(
            f"{counts['missing']} of {counts['input_rows']} requests in {folder.root} have no completion: a shard did "
            "not finish. Run its shard (`blendserve run-shard`) or the job again; finished rows are kept."
        )
