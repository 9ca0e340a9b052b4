"""The trigger form: Airflow params made from the JSON schema of `JobSpec`, so that both state the same limits.

The fields that every job needs stand open at the top; the others are grouped in sections, which start closed.
"""

from __future__ import annotations

from typing import Any

from airflow.sdk import Param

from blendserve.airflow import configuration, library
from blendserve.errors import UsageError
from blendserve.spec import EngineSpec, JobSpec, SamplingSpec

OPEN_FIELDS = ("input", "output", "model", "max_tokens")
PROMPT_FIELDS = ("sql", "id_column", "prompt_column", "template", "system", "raw", "truncate_prompt", "limit")
SECTIONS = ("Prompts", "Sampling", "Planning", "Engine")
MULTILINE_FIELDS = ("sql", "template", "system")
LIBRARY_TITLES = {
    "dataset": "Dataset",
    "template_file": "Template from the library",
    "sql_file": "SQL from the library",
}
# Fields that take text which the worker will run, and the option that lets the form have them.
FREE_TEXT = {"sql": "allow_free_sql", "template": "allow_free_template"}

# Help, in Markdown, where a person at the form needs other words than one at the command line.
HELP = {
    "input": "A Parquet file, a glob or a folder, or the URL of one. Relative paths start at the *data folder*.",
    "output": "The job's own folder for results and state; `{run_id}` becomes the run's id. Give the folder of an "
    "unfinished run to go on with it.",
    "gpus": "How many GPU workers run shards side by side: the plan has at least as many shards.",
    "on_row_error": "What becomes of the run when a row has no completion. The results are written either way.",
    "stop": 'A completion ends before the first of these. A JSON list, such as `["END", "\\n\\n"]`.',
}

ENUM_LABELS = {
    "policy": {
        "blend": "Blend: share prefixes, balance compute and memory",
        "dfs": "Depth first: share prefixes only",
        "fcfs": "First come, first served",
        "random": "Random order",
        "longest": "Longest first",
    },
    "on_row_error": {"continue": "Go on; failed rows carry their error", "fail": "Fail the run when any row failed"},
    "device": {"auto": "A GPU where there is one", "cpu": "CPU", "cuda": "GPU"},
    "dtype": {
        "auto": "As the device likes it",
        "float32": "float32",
        "bfloat16": "bfloat16",
        "float16": "float16",
    },
    "overlap": {"off": "Off", "on": "On: decodes beside prefill chunks, on a GPU"},
    "load_format": {"auto": "From the model's files", "dummy": "Random, for benchmarks"},
}


def form_params(**defaults: Any) -> dict[str, Param]:
    """A param for every field of `JobSpec` that the form may have, in its order, and one for each part of the library.

    `defaults` replace the proposed values of single fields, by name. Raises UsageError for a field that isn't there.
    """
    refused = {name for name, option in FREE_TEXT.items() if not configuration.get_boolean(option)}
    stated = JobSpec.model_json_schema()["properties"]
    properties = {name: field for name, field in stated.items() if name not in refused}
    proposed = {
        "input": configuration.get("default_input"),
        "output": configuration.get("default_output"),
        "model": configuration.get("default_model"),
        **defaults,
    }
    sectioned = sorted(
        (name for name in properties if name not in OPEN_FIELDS), key=lambda n: SECTIONS.index(_section(n))
    )
    fields = {name: _param(name, properties[name], proposed) for name in (*OPEN_FIELDS, *sectioned)}
    params = _library_params(defaults) | fields
    if unknown := sorted(defaults.keys() - params):
        raise UsageError(f"The form has no field(s) {', '.join(unknown)}. It has: {', '.join(params)}.")
    return params


def _library_params(defaults: dict[str, Any]) -> dict[str, Param]:
    """A choice of names for each part of the library that has any; the dataset stands open, the others in a section."""
    params = {}
    for field, option in library.FIELDS.items():
        if names := library.names(field):
            section = {} if field == "dataset" else {"section": _section(option)}
            params[field] = Param(
                defaults.get(field),
                title=LIBRARY_TITLES[field],
                description_md=f"A name of the library, in place of *{option}*. Empty: *{option}* as it is stated.",
                type=["null", "string"],
                enum=[None, *names],
                **section,
            )
    return params


def _param(name: str, field: dict[str, Any], proposed: dict[str, Any]) -> Param:
    schema = _without_union(field)
    default = proposed.get(name, schema.pop("default", None))
    schema.pop("default", None)
    help_text = HELP.get(name, schema.pop("description", ""))
    if name not in OPEN_FIELDS:
        schema["section"] = _section(name)
    if name in MULTILINE_FIELDS:
        schema["format"] = "multiline"
    if "enum" in schema:
        schema["values_display"] = {value: ENUM_LABELS.get(name, {}).get(value, value) for value in schema["enum"]}
    return Param(default, description_md=help_text, **schema)


def _without_union(field: dict[str, Any]) -> dict[str, Any]:
    """`field` in the shape that Airflow's form understands.

    pydantic states `int | None` as `anyOf`, the form wants a list of types. Lists of strings get the form's JSON
    editor (a list of one item type does that), because its plain text area can't hold a newline within an item.
    """
    schema = dict(field)
    if options := schema.pop("anyOf", None):
        (stated,) = [option for option in options if option["type"] != "null"]
        schema |= {**stated, "type": ["null", stated["type"]]}
    if schema["type"] == "array":
        schema["items"] = {"type": [schema["items"]["type"]]}
    return schema


def _section(name: str) -> str:
    if name in SamplingSpec.model_fields:
        return "Sampling"
    if name in EngineSpec.model_fields:
        return "Engine"
    return "Prompts" if name in PROMPT_FIELDS else "Planning"
