"""A query over the rows of the input, `select … from input`, in a DuckDB that reaches nothing else.

No file, network, extension, setting or Python object is within a query's reach, so that its author needs no trust.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from blendserve.errors import InputError, UsageError
from blendserve.input_files import InputFiles
from blendserve.row_groups import FEW_ROWS

_MEMORY_LIMIT = "3GiB"
# One thread, so that rows keep their order where the query states none.
_NUM_THREADS = 1
# In DuckDB's message when a table that it reads from outside fails, by its version.
_SIGNS_OF_A_DAMAGED_INPUT = ("reading the stream registered as 'input' failed", "get_next failed")
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
        with _locked_database(self.files) as database:
            try:
                for made in database.sql(self.sql).to_arrow_reader(FEW_ROWS):
                    batch = pa.RecordBatch.from_arrays(made.columns, schema=self.schema)
                    if left is not None and left <= 0:
                        return
                    is_empty = is_empty and not batch.num_rows
                    yield batch if left is None else batch.slice(0, left)
                    left = None if left is None else left - batch.num_rows
            except duckdb.Error as error:
                if any(sign in str(error) for sign in _SIGNS_OF_A_DAMAGED_INPUT):
                    raise self.files.damaged(error) from error
                raise UsageError(f"Option 'sql': the query fails: {_first_line(error)}.") from error
        if is_empty:
            raise InputError(f"Option 'sql': the query makes no rows of {self.num_rows} input rows. Widen it.")


def queried(files: InputFiles, sql: str) -> QueriedFiles:
    """`files` seen through `sql`, which is checked as far as it can be without reading rows.

    A column that it makes twice gets a number. Raises UsageError when it isn't one select over `input` or reaches for
    anything else.
    """
    with _locked_database(files) as database:
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
            raise UsageError(
                f"Option 'sql': the query can't be used: {_first_line(error)}. It sees the table `input` with the "
                f"columns {', '.join(files.schema.names)}, and nothing else."
            ) from error
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
def _locked_database(files: InputFiles) -> Iterator[duckdb.DuckDBPyConnection]:
    config = {"memory_limit": _MEMORY_LIMIT, "temp_directory": "", "threads": _NUM_THREADS}
    with duckdb.connect(config=config) as database:
        database.register("input", files.dataset())
        for lock in _LOCKS:
            database.execute(lock)
        yield database


def _first_line(error: duckdb.Error) -> str:
    return str(error).splitlines()[0].rstrip(".")
