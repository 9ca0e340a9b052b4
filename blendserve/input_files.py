"""The Parquet files that an input names: one file, a glob or a folder, local or on an object store.

Every file's footer is read and the columns are compared before the first row is used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import fsspec
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from blendserve.errors import InputError
from blendserve.file_store import store_error, store_errors

_BATCH_ROWS = 4096
_HASH_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class InputFiles:
    """The Parquet files that an input names, in the order in which their rows count."""

    stated: str
    filesystem: fsspec.AbstractFileSystem
    paths: tuple[str, ...]
    schema: pa.Schema
    num_rows: int

    def digest(self) -> str:
        """SHA-256 over the contents, file by file; names don't count, so a moved input is the same input."""
        total = hashlib.sha256()
        for path in self.paths:
            content = hashlib.sha256()
            with self.filesystem.open(path, "rb") as file:
                while block := file.read(_HASH_BYTES):
                    content.update(block)
            total.update(content.digest())
        return total.hexdigest()

    def dataset(self) -> pads.Dataset:
        """The files as one dataset in Arrow's sense, hive partitions as columns."""
        return pads.dataset(
            list(self.paths),
            schema=self.schema,
            format="parquet",
            filesystem=pafs.PyFileSystem(pafs.FSSpecHandler(self.filesystem)),
            partitioning="hive",
        )

    def batches(self, limit: int | None) -> Iterator[pa.RecordBatch]:
        """The rows in order, the first `limit` of them. Raises InputError where a file turns out to be damaged."""
        left = self.num_rows if limit is None else min(limit, self.num_rows)
        try:
            for batch in self.dataset().to_batches(batch_size=_BATCH_ROWS):
                if left <= 0:
                    return
                yield batch.slice(0, left)
                left -= batch.num_rows
        except (pa.ArrowException, OSError) as error:
            damaged = f"Input {self.stated} can't be read to its end: {error}. A file is damaged; write it again."
            raise store_error(self.stated, error, InputError(damaged)) from error


def open_input(stated: str) -> InputFiles:
    """The files that `stated` (a file, a glob or a folder, local or on an object store) names.

    Raises InputError when there is none, when one is no Parquet, when their columns differ, or when all are empty.
    """
    try:
        filesystem, path = fsspec.core.url_to_fs(stated)
        paths = _list_paths(filesystem, path)
    except store_errors() as error:
        raise store_error(stated, error, InputError(f"Input {stated} can't be reached: {error}.")) from error
    if not paths:
        raise InputError(
            f"Input {stated} names no Parquet file. Expected a file, a glob such as 'data/*.parquet', or a folder."
        )
    schemas, num_rows = {}, 0
    for name in paths:
        schemas[name], rows = _read_footer(filesystem, name)
        num_rows += rows
    first = schemas[paths[0]]
    for name, schema in schemas.items():
        if not schema.equals(first):
            raise InputError(
                f"Input files differ in their columns: {paths[0]} has [{_describe(first)}], {name} has "
                f"[{_describe(schema)}]. Expected the same columns and types; cast them or run two jobs."
            )
    if num_rows == 0:
        raise InputError(f"Input {stated} has no rows ({len(paths)} file(s) read). There is nothing to run.")
    arrow_filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(filesystem))
    partitioned = pads.dataset(paths, format="parquet", filesystem=arrow_filesystem, partitioning="hive").schema
    return InputFiles(stated, filesystem, tuple(paths), partitioned.remove_metadata(), num_rows)


def _list_paths(filesystem: fsspec.AbstractFileSystem, path: str) -> list[str]:
    if any(character in path for character in "*?["):
        return sorted(name for name in filesystem.glob(path) if filesystem.isfile(name))
    if filesystem.isdir(path):
        return sorted(name for name in filesystem.find(path) if _is_data_file(name, path))
    return [path] if filesystem.exists(path) else []


def _is_data_file(name: str, folder: str) -> bool:
    parts = name[len(folder) :].strip("/").split("/")
    return name.endswith((".parquet", ".pq")) and not any(part.startswith((".", "_")) for part in parts)


def _read_footer(filesystem: fsspec.AbstractFileSystem, name: str) -> tuple[pa.Schema, int]:
    try:
        with filesystem.open(name, "rb") as file:
            parquet = pq.ParquetFile(file)
            return parquet.schema_arrow.remove_metadata(), parquet.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        damaged = InputError(
            f"Input file {name} is no readable Parquet file: {error}. Expected a complete file; write it again, "
            "or leave it out by a narrower glob."
        )
        raise store_error(name, error, damaged) from error


def _describe(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)
