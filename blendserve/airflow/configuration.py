"""The `[blendserve]` section of Airflow's configuration: every option, its default and its meaning, declared once.

`get_provider_info` publishes the same table, so `airflow config list` shows it. An option can be set as
`AIRFLOW__BLENDSERVE__<NAME>` too. What a person may type into the trigger form is limited here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blendserve.errors import UsageError

SECTION = "blendserve"


@dataclass(frozen=True, slots=True)
class Option:
    """One option of the section."""

    name: str
    kind: str  # "string", "integer" or "boolean"
    default: str
    description: str


OPTIONS = {
    option.name: option
    for option in (
        Option("gpu_pool", "string", "gpu", "Pool of the tasks that run the engine: one slot a GPU."),
        Option(
            "gpu_pool_slots",
            "integer",
            "1",
            "Slots that the scheduler gives the pool when it starts and finds none of that name.",
        ),
        Option(
            "gpu_queue",
            "string",
            "",
            "Queue of the tasks that run the engine. Empty: the executor's default queue.",
        ),
        Option(
            "data_folder",
            "string",
            "",
            "Relative paths of the trigger form start here. Empty: the working directory of the task.",
        ),
        Option(
            "allowed_paths",
            "string",
            "",
            "Comma-separated folders and object-store prefixes that all paths of the trigger form must lie in: input, "
            "output, model, hardware profile. Empty: the data folder alone.",
        ),
        Option(
            "library_folder",
            "string",
            "",
            "Folder of the datasets, templates and SQL files that the trigger form offers by name. Empty: none.",
        ),
        Option(
            "allow_free_sql",
            "boolean",
            "False",
            "Whether the trigger form takes SQL as text. It runs without access to files and network either way.",
        ),
        Option(
            "allow_free_template",
            "boolean",
            "True",
            "Whether the trigger form takes a prompt template as text, which runs in Jinja's sandbox.",
        ),
        Option(
            "default_input",
            "string",
            "out/demo/requests.parquet",
            "What the trigger form proposes as input, and what a scheduled run without parameters reads.",
        ),
        Option(
            "default_output",
            "string",
            "out/runs/{run_id}",
            "What the trigger form proposes as output; {run_id} becomes the run's id.",
        ),
        Option("default_model", "string", "smollm2", "What the trigger form proposes as model."),
        Option("retry_delay_seconds", "integer", "30", "Seconds before a failed step is tried again."),
        Option(
            "log_progress_seconds",
            "integer",
            "5",
            "Seconds between two progress lines of a running shard.",
        ),
    )
}


def get(name: str) -> str:
    """The value of the option `name`, or its default."""
    from airflow.sdk import conf

    return str(conf.get(SECTION, name, fallback=OPTIONS[name].default))


def get_integer(name: str) -> int:
    """Raises UsageError for what is no whole number."""
    stated = get(name)
    try:
        return int(stated)
    except ValueError as error:
        raise UsageError(f"[{SECTION}] {name} is {stated!r}, expected a whole number.") from error


def get_boolean(name: str) -> bool:
    return get(name).strip().lower() in ("true", "t", "1", "yes", "on")


def data_folder() -> Path:
    """The folder that relative paths of the form start at, absolute."""
    return Path(get("data_folder") or ".").absolute()


def allowed_paths() -> tuple[str, ...]:
    """Folders and object-store prefixes that the form's paths must lie in."""
    stated = tuple(part.strip() for part in get("allowed_paths").split(",") if part.strip())
    return stated or (str(data_folder()),)


def section_info() -> dict[str, Any]:
    """The section as Airflow's provider schema wants it."""
    return {
        "description": "Defaults and limits of BlendServe's tasks.",
        "options": {
            option.name: {
                "description": option.description,
                "version_added": None,
                "type": option.kind,
                "example": None,
                "default": option.default,
            }
            for option in OPTIONS.values()
        },
    }
