"""From input rows to requests: keeps the rows as they are and makes one request of each.

Knows nothing of models: a request leaves here as text, chat messages or token ids, or with the reason why it is none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.meta
import jinja2.sandbox
import pyarrow as pa

from blendserve.errors import InputError, UsageError
from blendserve.input_files import InputFiles
from blendserve.job_folder import JobFolder
from blendserve.manifest import replacing
from blendserve.planner.database import compute, open_database
from blendserve.row_groups import RowGroupWriter
from blendserve.schemas import REQUESTS, RESULT_COLUMNS
from blendserve.spec import JobSpec

if TYPE_CHECKING:
    from blendserve.query import QueriedFiles

_INT32_MAX = 2**31 - 1
_NO_PYTHON_VALUE = (ValueError, OverflowError, KeyError)  # of pyarrow's, the last for an unknown time zone
_DEFAULT_PROMPT_COLUMNS = ("prompt_token_ids", "messages", "prompt")

Row = dict[str, Any]
PromptReader = Callable[[pa.RecordBatch], list[Row]]


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
            _prompt_reader(spec, schema),
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
    kind = _column_type(schema, name, "id")
    if not (_is_text(kind) or pa.types.is_integer(kind)):
        raise InputError(f"Id column '{name}' has type {kind}, expected text or integers.")
    return name


def _column_type(schema: pa.Schema, name: str, purpose: str) -> pa.DataType:
    if name not in schema.names:
        raise InputError(
            f"Input has no column '{name}' to take the {purpose} from. Its columns are: {', '.join(schema.names)}."
        )
    kind = schema.field(name).type
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    kinds = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return any(is_kind(kind) for is_kind in kinds)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _integer_column(schema: pa.Schema, name: str) -> str | None:
    if name not in schema.names:
        return None
    kind = schema.field(name).type
    if not (pa.types.is_integer(kind) or pa.types.is_null(kind)):
        raise InputError(f"Column '{name}' has type {kind}, expected integers; rename it if it means something else.")
    return name


def _integers(batch: pa.RecordBatch, name: str | None) -> list[int | None]:
    return [None] * batch.num_rows if name is None else batch.column(name).to_pylist()


def _prompt_reader(spec: JobSpec, schema: pa.Schema) -> PromptReader:
    if spec.template is not None:
        return _template_reader(spec.template, schema)
    name = spec.prompt_column or next((name for name in _DEFAULT_PROMPT_COLUMNS if name in schema.names), None)
    if name is None:
        raise InputError(
            f"Input has none of the columns {', '.join(_DEFAULT_PROMPT_COLUMNS)}. Say which column holds the prompt "
            f"(--prompt-column) or make one (--template). Its columns are: {', '.join(schema.names)}."
        )
    kind = _column_type(schema, name, "prompt")
    if _is_text(kind) or _is_bytes(kind) or pa.types.is_null(kind):
        return lambda batch: [_text_prompt(text) for text in _texts(batch.column(name))]
    if _is_list(kind) and pa.types.is_integer(kind.value_type):
        return lambda batch: [_token_prompt(ids) for ids in batch.column(name).to_pylist()]
    if _is_list(kind) and pa.types.is_struct(kind.value_type):
        return lambda batch: [_chat_prompt(messages) for messages in _python_values(batch.column(name))]
    raise InputError(
        f"Prompt column '{name}' has type {kind}; expected text, a list of token ids, or a list of "
        "{role, content} messages. Use --template '{{ " + name + " }}' to turn other types into text."
    )


def _texts(column: pa.Array) -> list[str | UnicodeDecodeError | None]:
    """The values as text; where bytes are no UTF-8, the error in their place."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_null(column.type):
        return [None] * len(column)
    texts: list[str | UnicodeDecodeError | None] = []
    for value in column.cast(pa.large_binary()).to_pylist():
        try:
            texts.append(None if value is None else value.decode("utf-8"))
        except UnicodeDecodeError as error:
            texts.append(error)
    return texts


def _python_values(column: pa.Array) -> list[Any]:
    """The values as Python's; where one has none, as nanoseconds and years after 9999, the error in its place."""
    try:
        return list(column.to_pylist())
    except _NO_PYTHON_VALUE:
        return [_python_value(value) for value in column]


def _python_value(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except _NO_PYTHON_VALUE as error:
        return error


def _text_prompt(text: str | UnicodeDecodeError | None) -> Row:
    if text is None:
        return {"error": "the prompt is null"}
    if isinstance(text, UnicodeDecodeError):
        return {"error": f"the prompt is no UTF-8 text: {text.reason} at byte {text.start}"}
    return {"prompt": text} if text.strip() else {"error": "the prompt is empty"}


def _token_prompt(ids: list[int | None] | None) -> Row:
    if ids is None:
        return {"error": "the prompt is null"}
    if not ids:
        return {"error": "the prompt is empty"}
    for position, token in enumerate(ids):
        if token is None or not 0 <= token <= _INT32_MAX:
            return {"error": f"prompt_token_ids[{position}] is {token}, outside the vocabulary"}
    return {"prompt_token_ids": ids}


def _chat_prompt(messages: list[Row | None] | Exception | None) -> Row:
    if messages is None:
        return {"error": "the prompt is null"}
    if isinstance(messages, Exception):
        return {"error": f"the prompt can't be read: {messages}"}
    if not messages:
        return {"error": "the prompt is empty"}
    for position, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance((message or {}).get(key), str):
                return {"error": f"messages[{position}] has no text in '{key}'"}
    return {"messages": [{"role": message["role"], "content": message["content"]} for message in messages if message]}


def _template_reader(source: str, schema: pa.Schema) -> PromptReader:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, autoescape=False, finalize=_not_null
    )
    try:
        parsed = environment.parse(source)
        names = sorted(jinja2.meta.find_undeclared_variables(parsed))
        template = environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UsageError(
            f"Template can't be parsed: {error.message} (line {error.lineno}). Expected Jinja, as in "
            "'Summarize: {{ body }}'; a column whose name is not one word gets another name with --sql."
        ) from error
    if any(True for _ in jinja2.meta.find_referenced_templates(parsed)):
        raise UsageError("Template includes, imports or extends another one, which it can't: a template stands alone.")
    if not names:
        raise UsageError(
            f"Template {source!r} names no column, so every row would get the same prompt. Name one, as in "
            "'Summarize: {{ body }}'."
        )
    for name in names:
        _column_type(schema, name, "template's value")

    def render(batch: pa.RecordBatch) -> list[Row]:
        columns = [_values(batch.column(name)) for name in names]
        return [_render_row(template, dict(zip(names, values, strict=True))) for values in zip(*columns, strict=True)]

    return render


def _not_null(value: Any) -> Any:
    """Of what a template writes: a null inside a column's value would become the word None."""
    if value is None:
        raise ValueError("it writes a null; give it something else, as in {{ name or 'unknown' }}")
    return value


def _values(column: pa.Array) -> list[Any]:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    return _texts(column) if _is_text(kind) or _is_bytes(kind) else _python_values(column)


def _render_row(template: jinja2.Template, values: Row) -> Row:
    for name, value in values.items():
        if value is None:
            return {"error": f"column '{name}', which the template names, is null"}
        if isinstance(value, UnicodeDecodeError):
            return {"error": f"column '{name}', which the template names, is no UTF-8 text"}
        if isinstance(value, Exception):
            return {"error": f"column '{name}', which the template names, can't be read: {value}"}
    try:
        return _text_prompt(template.render(values))
    except Exception as error:  # noqa: BLE001 - a template runs the user's expressions: whatever fails, fails this row
        return {"error": f"the template fails on this row: {type(error).__name__}: {error}"}


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
