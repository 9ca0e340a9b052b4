"""From what a DAG's author states and what a person types into the trigger form to one validated `JobSpec`.

A DAG's author is trusted. The form is not: its paths must lie in the folders that the administrator allows unless they
are as the author proposes them, names of the library stand for what the administrator put there, and nothing typed into
it is ever rendered as an Airflow template.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from blendserve.airflow import configuration, library
from blendserve.airflow.form import FREE_TEXT
from blendserve.errors import UsageError
from blendserve.spec import JobSpec, describe_validation_error

_GLOB_CHARACTERS = re.compile(r"[*?\[]")
# The password of user:password@host, and what follows token=, key=, secret=, sig= and the like in a URL.
_SECRETS = re.compile(
    r"://[^/@\s:]*:([^/@\s]+)@|[?&][^=&\s]*(?:token|key|secret|password|sig|signature)=([^&\s]+)", re.IGNORECASE
)


def job_spec(
    options: Mapping[str, Any], form: Mapping[str, Any], run_id: str, *, proposed: Mapping[str, Any] | None = None
) -> JobSpec:
    """The job that `options` (the DAG's author, rendered) and `form` (the trigger form; wins) state together.

    `proposed`: what the DAG's author put into the form.
    `{run_id}` in the output becomes the run's id; relative paths start at the data folder.
    Raises UsageError with a line for each wrong field, naming it.
    """
    _check_text(form)
    stated = _stated(form)
    from_library = _from_library(stated)
    values = {**options, **stated, **from_library}
    try:
        spec = JobSpec.model_validate(values)
    except ValidationError as error:
        raise UsageError(describe_validation_error(error)) from error
    paths = {
        "input": _absolute(spec.input),
        "output": _absolute(spec.output.replace("{run_id}", path_name(run_id))),
        "model": _absolute(spec.model) if Path(_absolute(spec.model)).is_dir() else spec.model,
        "hardware": _absolute(spec.hardware) if spec.hardware.endswith(".json") else spec.hardware,
    }
    spec = spec.model_copy(update=paths)
    for name in paths:
        if name in form and name not in from_library and form[name] != (proposed or {}).get(name):
            _check_allowed(name, getattr(spec, name))
    return spec


def secrets_in(value: Any) -> list[str]:
    """Passwords and tokens that the URLs in `value` (text, or lists and mappings of it) carry."""
    if isinstance(value, str):
        return [secret for match in _SECRETS.findall(value) for secret in match if secret]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [secret for part in parts for secret in secrets_in(part)]


def path_name(run_id: str) -> str:
    """`run_id` as the name of one folder: whoever triggers a run chooses its id freely."""
    return re.sub(r"[^A-Za-z0-9_.+-]", "-", run_id).lstrip(".") or "run"


def _stated(form: Mapping[str, Any]) -> dict[str, Any]:
    """The form without its empty text fields: emptied optional fields arrive as "" from some clients."""
    optional = {name for name, field in JobSpec.model_fields.items() if field.default is None}
    return {name: None if value == "" and name in optional else value for name, value in form.items()}


def _check_text(form: Mapping[str, Any]) -> None:
    for name, value in form.items():
        if secrets_in(value):
            raise UsageError(
                f"Option '{name}' holds a password or token, which everybody would see who may read the run. Give it "
                "to the workers instead: see storage_conn_id."
            )
    for name, option in FREE_TEXT.items():
        if form.get(name) and not configuration.get_boolean(option):
            raise UsageError(
                f"Option '{name}': the trigger form may not state it as text here. Choose one of the library, or ask "
                f"the administrator to turn [{configuration.SECTION}] {option} on."
            )


def _from_library(form: dict[str, Any]) -> dict[str, str]:
    """Take the library's fields out of `form`; what their names stand for, by the option that they fill."""
    found = {}
    for field, option in library.FIELDS.items():
        name = form.pop(field, None)
        if not name:
            continue
        if option != "input" and form.get(option):
            raise UsageError(f"Option '{field}': '{option}' is stated too; they exclude each other. Empty one of them.")
        found[option] = library.resolve(field, str(name))
    return found


def _absolute(path: str) -> str:
    if "://" in path:
        return path
    return str(configuration.data_folder() / Path(path).expanduser())


def _check_allowed(name: str, value: str) -> None:
    if name in ("model", "hardware") and not Path(value).is_absolute() and ".." not in Path(value).parts:
        return  # a name
    allowed = configuration.allowed_paths()
    if ".." not in Path(value).parts and any(_lies_in(value, place) for place in allowed):
        return
    raise UsageError(
        f"Option '{name}': {value!r} lies outside the places that the trigger form may use: {', '.join(allowed)}. "
        f"Choose a path in one of them, without '..', or ask the administrator to add the folder to "
        f"[{configuration.SECTION}] allowed_paths."
    )


def _lies_in(value: str, place: str) -> bool:
    """Whether the path or URL `value` lies in the folder or below the URL prefix `place`, symbolic links followed."""
    if "://" in value or "://" in place:
        return value == place or value.startswith(place.rstrip("/") + "/")
    fixed = Path(value)
    while _GLOB_CHARACTERS.search(str(fixed)):
        fixed = fixed.parent
    return Path(os.path.realpath(fixed)).is_relative_to(os.path.realpath(place))
