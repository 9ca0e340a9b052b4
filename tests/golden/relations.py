"""Runs one SQL relation on small tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from blendserve.planner.database import compute, open_database


def rows_of(
    tmp_path,
    relation: str,
    tables: dict[str, dict[str, list[Any]]],
    files: dict[str, list[Path]] | None = None,
    **parameters: Any,
) -> list[dict]:
    with open_database(tmp_path) as database:
        arrow = {name: pa.table(columns) for name, columns in tables.items()}
        return compute(database, relation, parameters=parameters, tables=arrow, files=files).to_pylist()
