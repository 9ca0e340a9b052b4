"""Parquet files whose row groups are bounded in rows and in bytes: long rows need no more memory than short ones."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

FEW_ROWS = 256  # that are read at a time: a row may be a whole book
_MAX_ROWS = 4096
_MAX_BYTES = 64 << 20


class RowGroupWriter:
    """Writes a few rows at a time as row groups: one ends with the rows that reach a limit. A context manager."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._file = pq.ParquetWriter(path, schema)
        self._held: list[pa.Table] = []
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

    def write(self, rows: pa.Table) -> None:
        self._held.append(rows)
        self._num_rows += rows.num_rows
        self._num_bytes += rows.nbytes
        if self._num_rows >= _MAX_ROWS or self._num_bytes >= _MAX_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._held:
            self._file.write_table(pa.concat_tables(self._held))
        self._held, self._num_rows, self._num_bytes = [], 0, 0
