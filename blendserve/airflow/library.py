"""The library: datasets, templates and SQL files that an administrator allows the trigger form to name.

    library/
      datasets.yaml            name: path or URL, one a line
      templates/NAME.jinja     prompt templates
      sql/NAME.sql             queries over the input

The form offers the names; what a name stands for never comes from the form.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from blendserve.airflow import configuration
from blendserve.errors import UsageError

# Form field → the option of a job that it fills.
FIELDS = {"dataset": "input", "template_file": "template", "sql_file": "sql"}
_PLACES = {"template_file": ("templates", ".jinja"), "sql_file": ("sql", ".sql")}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def names(field: str) -> list[str]:
    """What the form offers for `field`, sorted; nothing where the administrator set no library up."""
    root = _root()
    if root is None:
        return []
    if field == "dataset":
        return sorted(_datasets(root))
    folder, suffix = _PLACES[field]
    return sorted(path.name.removesuffix(suffix) for path in (root / folder).glob(f"*{suffix}") if path.is_file())


def resolve(field: str, name: str) -> str:
    """What `name` stands for: a dataset's path, a template's or a query's text. Raises UsageError for other names."""
    root = _root()
    if root is None or not _NAME.fullmatch(name) or name not in names(field):
        offered = ", ".join(names(field)) or "none"
        raise UsageError(f"Option '{field}': {name!r} is not in the library. It has: {offered}.")
    if field == "dataset":
        return _datasets(root)[name]
    folder, suffix = _PLACES[field]
    return (root / folder / f"{name}{suffix}").read_text(encoding="utf-8").strip()


def _root() -> Path | None:
    stated = configuration.get("library_folder")
    return Path(stated) if stated else None


def _datasets(root: Path) -> dict[str, str]:
    path = root / "datasets.yaml"
    if not path.is_file():
        return {}
    try:
        stated = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"{path} can't be read: {error}. Expected `name: path` a line.") from error
    if not isinstance(stated, dict) or not all(isinstance(value, str) for value in stated.values()):
        raise UsageError(f"{path}: expected a mapping of names to paths or URLs.")
    return {str(name): value for name, value in stated.items()}
