"""From the columns of input rows to prompts: text, chat messages, token ids, or why a row has none.

A prompt is what the template makes of a row, or what stands in a column. Whatever a row holds, it fails itself at most.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.meta
import jinja2.sandbox
import pyarrow as pa

from blendserve.errors import InputError, UsageError
from blendserve.spec import JobSpec

_NO_PYTHON_VALUE = (ValueError, OverflowError, KeyError)  # of pyarrow's, the last for an unknown time zone
_MOST_TOKEN_ID = 2**31 - 1
_DEFAULT_PROMPT_COLUMNS = ("prompt_token_ids", "messages", "prompt")

Row = dict[str, Any]
PromptReader = Callable[[pa.RecordBatch], list[Row]]


def prompt_reader(spec: JobSpec, schema: pa.Schema) -> PromptReader:
    """What makes the prompts of a batch of rows: fields of a request each, `error` where a row has none.

    Raises InputError for a column that is missing or of an unusable type, UsageError for a bad template.
    """
    if spec.template is not None:
        return _template_reader(spec.template, schema)
    name = spec.prompt_column or next((name for name in _DEFAULT_PROMPT_COLUMNS if name in schema.names), None)
    if name is None:
        raise InputError(
            f"Input has none of the columns {', '.join(_DEFAULT_PROMPT_COLUMNS)}. Say which column holds the prompt "
            f"(--prompt-column) or make one (--template). Its columns are: {', '.join(schema.names)}."
        )
    kind = column_type(schema, name, "prompt")
    if is_text(kind) or _is_bytes(kind) or pa.types.is_null(kind):
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
        if token is None or not 0 <= token <= _MOST_TOKEN_ID:
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
        column_type(schema, name, "template's value")

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
    return _texts(column) if is_text(kind) or _is_bytes(kind) else _python_values(column)


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


def column_type(schema: pa.Schema, name: str, purpose: str) -> pa.DataType:
    """The type of a column's values. Raises InputError when it isn't there; `purpose`: what it is for."""
    if name not in schema.names:
        raise InputError(
            f"Input has no column '{name}' to take the {purpose} from. Its columns are: {', '.join(schema.names)}."
        )
    kind = schema.field(name).type
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    kinds = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return any(is_kind(kind) for is_kind in kinds)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))
