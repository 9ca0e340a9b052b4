"""The DuckDB connection that the planner's SQL runs on: memory is bounded, values are bound and never formatted in."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

import blendserve_sql
from blendserve.manifest import replacing

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_MAX_MEMORY_BYTES = 5 * 2**29  # with the rest of a step, 6 GB are enough for a billion tokens
_MEMORY_OF_MANY_THREADS = 2**30


def default_memory_bytes() -> int:
    """Half of the memory that this process may have (what is free, its container's limit), at most 2.5 GiB."""
    limits = [int(psutil.virtual_memory().available), 2 * _MAX_MEMORY_BYTES]
    return min([*limits, *_container_limits()]) // 2


def _container_limits() -> list[int]:
    """The limits of this process's control groups, of version 2 and of version 1, seen from inside and from outside."""
    places = {_CGROUPS / "memory.max", _CGROUPS / "memory" / "memory.limit_in_bytes"}
    if _OWN_CGROUPS.exists():
        for line in _OWN_CGROUPS.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                places.add(_CGROUPS / path.lstrip("/") / "memory.max")
            elif "memory" in controllers.split(","):
                places.add(_CGROUPS / "memory" / path.lstrip("/") / "memory.limit_in_bytes")
    stated = [place.read_text(encoding="ascii").strip() for place in places if place.exists()]
    return [int(limit) for limit in stated if limit.isdigit()]


@contextmanager
def open_database(folder: Path, *, memory_bytes: int | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection that spills into a temporary folder inside `folder` beyond `memory_bytes`."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".duckdb-") as spill:
        limit = default_memory_bytes() if memory_bytes is None else memory_bytes
        config: dict[str, Any] = {"memory_limit": f"{limit // 2**20}MiB", "temp_directory": spill}
        if limit < _MEMORY_OF_MANY_THREADS:  # each thread holds blocks of its own while it sorts
            config |= {"threads": 1, "preserve_insertion_order": False}
        connection = duckdb.connect(config=config)
        try:
            yield connection
        finally:
            connection.close()


def compute(
    connection: duckdb.DuckDBPyConnection,
    relation: str,
    *,
    parameters: Mapping[str, Any] | None = None,
    tables: Mapping[str, pa.Table] | None = None,
    files: Mapping[str, Sequence[Path]] | None = None,
) -> pa.Table:
    """The rows of `relation`. Its SQL reads `tables` and `files` by name and has `parameters` bound to its `$names`."""
    register_files(connection, files or {})
    for name, table in (tables or {}).items():
        connection.register(name, table)
    try:
        return connection.sql(blendserve_sql.read(relation), params=dict(parameters or {})).to_arrow_table()
    finally:
        for name in tables or {}:
            connection.unregister(name)


def register_files(connection: duckdb.DuckDBPyConnection, files: Mapping[str, Sequence[Path]]) -> None:
    """Let SQL read Parquet files by name, with their rows numbered in `file_row_number`.

    A path is taken as it is: what looks like a pattern or a partition in it is part of a folder's name.
    """
    for name, paths in files.items():
        literal = [glob.escape(str(path)) for path in paths]
        found = connection.read_parquet(literal, hive_partitioning=False, file_row_number=True)
        found.create_view(name, replace=True)


def write_relation(path: Path, table: pa.Table, schema: pa.Schema) -> None:
    """Write `table` with exactly `schema` to `path`, all of it or nothing."""
    with replacing(path) as temporary:
        pq.write_table(table.select(schema.names).cast(schema), temporary, compression="zstd")
