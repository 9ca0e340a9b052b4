"""A query over the rows of the input, `select … from input`, in a DuckDB that reaches nothing else.

No file, network, extension, setting or Python object is within a query's reach, so that its author needs no trust.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from blendserve.errors import BlendServeError, InputError, UsageError
from blendserve.input_files import InputFiles
from blendserve.row_groups import FEW_ROWS

_MEMORY_LIMIT = "3GiB"
# One thread, so that rows keep their order where the query states none.
_NUM_THREADS = 1
# In this order: the last one keeps a query from undoing the others.
_LOCKS = (
    "set python_enable_replacements = false",
    "set autoinstall_known_extensions = false",
    "set autoload_known_extensions = false",
    "set enable_external_access = false",
    "set lock_configuration = true",
)


@dataclass(frozen=True, slots=True)
class QueriedFiles:
    """Input files seen through a query: what `InputFiles` offers to whoever reads rows."""

    files: InputFiles
    sql: str
    schema: pa.Schema

    @property
    def num_rows(self) -> int:
        """Of the files; how many the query makes of them shows when it runs."""
        return self.files.num_rows

    @property
    def paths(self) -> tuple[str, ...]:
        return self.files.paths

    def digest(self) -> str:
        return self.files.digest()

    def batches(self, limit: int | None) -> Iterator[pa.RecordBatch]:
        """The query's rows in order, the first `limit` of them.

        Raises UsageError when the query fails on the rows, InputError when it makes none or a file is damaged.
        """
        left, is_empty = limit, True
        rows = _Rows(self.files)
        with _locked_database(rows) as database:
            try:
                for made in database.sql(self.sql).to_arrow_reader(FEW_ROWS):
                    batch = pa.RecordBatch.from_arrays(made.columns, schema=self.schema)
                    if left is not None and left <= 0:
                        return
                    is_empty = is_empty and not batch.num_rows
                    yield batch if left is None else batch.slice(0, left)
                    left = None if left is None else left - batch.num_rows
            except (duckdb.Error, pa.ArrowException, OSError) as error:  # Arrow has the last two, for later rows
                failed = UsageError(f"Option 'sql': the query fails: {_first_line(error)}.")
                raise rows.error or failed from error
        if is_empty:
            raise InputError(f"Option 'sql': the query makes no rows of {self.num_rows} input rows. Widen it.")


class _Rows:
    """The input's rows as DuckDB reads them: from the first one again whenever a query scans them.

    Nothing reads on when the query has ended, as the threads of an Arrow dataset would: a process that ends while they
    read from an object store is aborted. DuckDB 1.5 reads ahead too, in threads of Arrow's: `close` waits for them.
    """

    def __init__(self, files: InputFiles) -> None:
        self.error: BlendServeError | None = None  # why the rows can't be read
        self.schema = files.schema
        self._files = files
        self._is_closed = False
        self._reading = threading.Lock()

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        reader = pa.RecordBatchReader.from_batches(self.schema, self._batches())
        return reader.__arrow_c_stream__(requested_schema)

    def close(self) -> None:
        with self._reading:
            self._is_closed = True

    def _batches(self) -> Iterator[pa.RecordBatch]:
        batches = self._files.batches(None)
        while (batch := self._next(batches)) is not None:
            yield batch

    def _next(self, batches: Iterator[pa.RecordBatch]) -> pa.RecordBatch | None:
        with self._reading:
            try:
                return None if self._is_closed else next(batches, None)
            except BlendServeError as error:
                self.error = error
                raise


def queried(files: InputFiles, sql: str) -> QueriedFiles:
    """`files` seen through `sql`, which is checked as far as it can be without reading rows.

    A column that it makes twice gets a number. Raises UsageError when it isn't one select over `input` or reaches for
    anything else.
    """
    rows = _Rows(files)
    with _locked_database(rows) as database:
        try:
            statements = database.extract_statements(sql)
            if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
                raise UsageError(
                    f"Option 'sql': expected one select over the table `input`, got {len(statements)} statement(s) "
                    f"({', '.join(statement.type.name for statement in statements) or 'none'})."
                )
            schema = database.sql(sql).select("*").limit(0).to_arrow_table().schema
            _check_types(schema)
        except duckdb.Error as error:
            unusable = UsageError(
                f"Option 'sql': the query can't be used: {_first_line(error)}. It sees the table `input` with the "
                f"columns {', '.join(files.schema.names)}, and nothing else."
            )
            raise rows.error or unusable from error
    return QueriedFiles(files, sql, schema)


def _check_types(schema: pa.Schema) -> None:
    for field in schema:
        try:
            pq.write_table(pa.schema([field]).empty_table(), io.BytesIO())
        except pa.ArrowException as error:
            raise UsageError(
                f"Option 'sql': the query makes a column '{field.name}' of type {field.type}, which Parquet can't "
                "hold. Cast it to another type, such as varchar, or leave it out."
            ) from error


@contextmanager
def _locked_database(rows: _Rows) -> Iterator[duckdb.DuckDBPyConnection]:
    config = {"memory_limit": _MEMORY_LIMIT, "temp_directory": "", "threads": _NUM_THREADS}
    with duckdb.connect(config=config) as database:
        try:
            database.register("input", rows)
        except duckdb.Error as error:
            columns = ", ".join(f"{field.name}: {field.type}" for field in rows.schema)
            raise UsageError(
                f"Option 'sql': the input can't be queried: {_first_line(error)}. Expected types that DuckDB has, got "
                f"{columns}. Write the input with other types, or leave the option out."
            ) from error
        for lock in _LOCKS:
            database.execute(lock)
        try:
            yield database
        finally:
            rows.close()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")
