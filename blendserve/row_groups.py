"""Parquet files whose row groups are bounded in rows and in bytes: long rows need no more memory than short ones."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

_MAX_ROWS = 4096
_MAX_BYTES = 64 << 20


class RowGroupWriter:
    """Writes small batches as row groups: one ends with the batch that reaches a limit. A context manager."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._file = pq.ParquetWriter(path, schema)
        self._held: list[pa.RecordBatch] = []
        self._num_rows = 0
        self._num_bytes = 0

    def __enter__(self) -> RowGroupWriter:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        try:
            if error is None:
                self._flush()
        finally:
            self._file.close()

    def write(self, batch: pa.RecordBatch) -> None:
        self._held.append(batch)
        self._num_rows += batch.num_rows
        self._num_bytes += batch.nbytes
        if self._num_rows >= _MAX_ROWS or self._num_bytes >= _MAX_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._held:
            self._file.write_table(pa.Table.from_batches(self._held))
        self._held, self._num_rows, self._num_bytes = [], 0, 0
