"""From input rows to requests: keeps the rows as they are and makes one request of each.

Knows nothing of models: a request leaves here as text, chat messages or token ids, or with the reason why it is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from blendserve.errors import InputError
from blendserve.input_files import InputFiles
from blendserve.job_folder import JobFolder
from blendserve.manifest import replacing
from blendserve.planner.database import compute, open_database
from blendserve.prompt_reader import PromptReader, column_type, is_text, prompt_reader
from blendserve.row_groups import RowGroupWriter
from blendserve.schemas import REQUESTS, RESULT_COLUMNS
from blendserve.spec import JobSpec

if TYPE_CHECKING:
    from blendserve.query import QueriedFiles

_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class RequestReader:
    """How rows of one input become requests, with every column checked before the first row is read."""

    id_column: str | None
    max_tokens_column: str | None
    hint_column: str | None
    read_prompts: PromptReader

    @classmethod
    def of(cls, spec: JobSpec, schema: pa.Schema) -> RequestReader:
        """Raises InputError for a column that is missing or of an unusable type, UsageError for a bad template."""
        id_column = _find_id_column(spec, schema)
        taken = [
            name for name in RESULT_COLUMNS.names if name in schema.names and not (name == id_column == "request_id")
        ]
        if taken:
            raise InputError(
                f"Input column(s) {', '.join(taken)} have names that the output needs for itself. Rename them in the "
                "input" + (" or choose --id-column request_id." if "request_id" in taken else ".")
            )
        return cls(
            id_column,
            _integer_column(schema, "max_tokens"),
            _integer_column(schema, "output_tokens_hint"),
            prompt_reader(spec, schema),
        )

    def read(self, batch: pa.RecordBatch, first_row_index: int) -> pa.RecordBatch:
        """The requests of a batch of input rows, in REQUESTS' schema."""
        indices = range(first_row_index, first_row_index + batch.num_rows)
        ids = self._ids(batch, first_row_index)
        limits = _integers(batch, self.max_tokens_column)
        hints = _integers(batch, self.hint_column)
        rows = []
        for index, request_id, prompt, limit, hint in zip(
            indices, ids, self.read_prompts(batch), limits, hints, strict=True
        ):
            row = {"row_index": index, "request_id": request_id, **prompt}
            if limit is not None and limit < 1:
                row = {"row_index": index, "request_id": request_id, "error": f"max_tokens is {limit}, expected >= 1"}
            row["max_tokens"] = None if limit is None else min(max(limit, 1), _INT32_MAX)
            row["output_tokens_hint"] = None if hint is None else min(max(hint, 1), _INT32_MAX)
            rows.append(row)
        return pa.RecordBatch.from_pylist(rows, schema=REQUESTS)

    def _ids(self, batch: pa.RecordBatch, first_row_index: int) -> list[str]:
        if self.id_column is None:
            return [str(first_row_index + offset) for offset in range(batch.num_rows)]
        column = batch.column(self.id_column)
        if column.null_count:
            offset = column.is_null().to_pylist().index(True)
            raise InputError(
                f"Id column '{self.id_column}' is null in row {first_row_index + offset} (counted from 0). Each "
                "request needs an id; fill it in, or choose another --id-column."
            )
        try:
            ids: list[str] = column.cast(pa.string()).to_pylist()
        except (UnicodeDecodeError, pa.ArrowException) as error:
            raise InputError(f"Id column '{self.id_column}' holds ids that are no UTF-8 text: {error}.") from error
        return ids


def _find_id_column(spec: JobSpec, schema: pa.Schema) -> str | None:
    name = spec.id_column or ("request_id" if "request_id" in schema.names else None)
    if name is None:
        return None
    kind = column_type(schema, name, "id")
    if not (is_text(kind) or pa.types.is_integer(kind)):
        raise InputError(f"Id column '{name}' has type {kind}, expected text or integers.")
    return name


def _integer_column(schema: pa.Schema, name: str) -> str | None:
    if name not in schema.names:
        return None
    kind = schema.field(name).type
    if not (pa.types.is_integer(kind) or pa.types.is_null(kind)):
        raise InputError(f"Column '{name}' has type {kind}, expected integers; rename it if it means something else.")
    return name


def _integers(batch: pa.RecordBatch, name: str | None) -> list[int | None]:
    return [None] * batch.num_rows if name is None else batch.column(name).to_pylist()


def extract_requests(spec: JobSpec, files: InputFiles | QueriedFiles, folder: JobFolder) -> dict[str, int]:
    """Write `input_rows` (the input as it is, or what the job's query makes of it) and `requests`.

    Returns how many rows there are and how many fail. Raises InputError when two rows have the same id.
    """
    with (
        replacing(folder.relation("input_rows")) as rows_path,
        replacing(folder.relation("requests")) as requests_path,
    ):
        counts = _write(spec, files, rows_path, requests_path)
        _check_ids_are_unique(requests_path)  # before the files have their names, or they would count as extracted
    return counts


def _write(spec: JobSpec, files: InputFiles | QueriedFiles, rows_path: Path, requests_path: Path) -> dict[str, int]:
    reader = RequestReader.of(spec, files.schema)
    num_rows, num_errors = 0, 0
    with RowGroupWriter(rows_path, files.schema) as rows, RowGroupWriter(requests_path, REQUESTS) as requests:
        for batch in files.batches(spec.limit):
            made = reader.read(batch, num_rows)
            rows.write(pa.Table.from_batches([batch]))
            requests.write(pa.Table.from_batches([made]))
            num_rows += batch.num_rows
            num_errors += len(made) - made.column("error").null_count
    return {"num_rows": num_rows, "num_row_errors": num_errors}


def _check_ids_are_unique(requests: Path) -> None:
    with open_database(requests.parent) as connection:
        repeated = compute(connection, "duplicate_request_ids", files={"requests": [requests]}).to_pylist()
    if repeated:
        shown = ", ".join(
            f"{row['request_id']!r} (rows {row['first_row_index']} and {row['last_row_index']})" for row in repeated
        )
        raise InputError(
            f"Request ids are not unique: {shown}. Each row needs an id of its own: fix the input, choose another "
            "--id-column, or leave it out to number the rows."
        )
