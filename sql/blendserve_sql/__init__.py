"""The SQL of BlendServe, one relation a file: the file's name is the relation's name."""

from __future__ import annotations

from importlib.resources import files


def read(relation: str) -> str:
    """The statement that computes `relation`: it reads tables by name and has values bound, none formatted in."""
    return files(__package__).joinpath(f"{relation}.sql").read_text(encoding="utf-8")
