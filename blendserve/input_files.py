"""The Parquet files that an input names: one file, a glob or a folder, local or on an object store.

Every file's footer is read and the columns are compared before the first row is used. Folders such as `day=1` are
columns too, but only below the stated folder or below the part of a glob that is no pattern.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import fsspec
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from blendserve.errors import BlendServeError, InputError
from blendserve.file_store import store_error, store_errors
from blendserve.row_groups import FEW_ROWS

_PATTERN_CHARACTERS = "*?["
_HASH_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class InputFiles:
    """The Parquet files that an input names, in the order in which their rows count. `root`: where partitions begin."""

    stated: str
    filesystem: fsspec.AbstractFileSystem
    root: str
    paths: tuple[str, ...]
    schema: pa.Schema
    num_rows: int

    def digest(self) -> str:
        """SHA-256 over contents and partitions, file by file; other names don't count: a moved input is the same."""
        total = hashlib.sha256()
        for path in self.paths:
            content = hashlib.sha256()
            with self.filesystem.open(path, "rb") as file:
                while block := file.read(_HASH_BYTES):
                    content.update(block)
            total.update(content.digest())
            if partitions := _partitions(path, self.root):
                total.update(json.dumps(partitions).encode())
        return total.hexdigest()

    def dataset(self) -> pads.Dataset:
        """The files as one dataset in Arrow's sense, hive partitions as columns."""
        return _dataset(self.filesystem, self.root, list(self.paths), self.schema)

    def batches(self, limit: int | None) -> Iterator[pa.RecordBatch]:
        """The rows in order, the first `limit` of them. Raises InputError where a file turns out to be damaged."""
        left = self.num_rows if limit is None else min(limit, self.num_rows)
        try:
            for batch in self._all_batches():
                if left <= 0:
                    return
                yield batch.slice(0, left)
                left -= batch.num_rows
        except (pa.ArrowException, OSError) as error:
            raise self.damaged(error) from error

    def damaged(self, error: Exception) -> BlendServeError:
        """What to raise when reading the rows ends in `error`."""
        damaged = f"Input {self.stated} can't be read to its end: {error}. A file is damaged; write it again."
        return store_error(self.stated, error, InputError(damaged))

    def _all_batches(self) -> Iterator[pa.RecordBatch]:
        """A few rows at a time of each file: a dataset's own batches hold a whole row group in memory, and more."""
        for part in self.dataset().get_fragments():
            partitions = pads.get_partition_keys(part.partition_expression)
            with self.filesystem.open(part.path, "rb") as file:
                # One of Arrow's threads may be what reads here, for a query: it can't wait for others.
                for batch in pq.ParquetFile(file).iter_batches(batch_size=FEW_ROWS, use_threads=False):
                    added = [
                        pa.repeat(pa.scalar(partitions.get(field.name), field.type), batch.num_rows)
                        for field in list(self.schema)[batch.num_columns :]
                    ]
                    yield pa.RecordBatch.from_arrays([*batch.columns, *added], schema=self.schema)


def open_input(stated: str, *, output: str | None = None) -> InputFiles:
    """The files that `stated` (a file, a glob or a folder, local or on an object store) names.

    What lies in the job's `output` folder is left out. Raises InputError when there is no file, when one is no Parquet,
    when their columns differ or can't be told apart, or when all are empty.
    """
    try:
        filesystem, path = fsspec.core.url_to_fs(stated)
        root, paths = _list_paths(filesystem, path)
        outside = paths if output is None else _leave_out(paths, filesystem, output)
    except store_errors() as error:
        raise store_error(stated, error, InputError(f"Input {stated} can't be reached: {error}.")) from error
    if not outside:
        left_out = f" but such as lie in the output folder {output}, which are never input" if paths else ""
        raise InputError(
            f"Input {stated} names no Parquet file{left_out}. Expected a file, a glob such as 'data/*.parquet', or a "
            "folder."
        )
    paths, schemas, num_rows = outside, {}, 0
    for name in paths:
        schemas[name], rows = _read_footer(filesystem, name)
        num_rows += rows
    _check_columns(schemas, root)
    if num_rows == 0:
        raise InputError(f"Input {stated} has no rows ({len(paths)} file(s) read). There is nothing to run.")
    try:
        schema = _with_partitions(pa.unify_schemas(schemas.values()), _dataset(filesystem, root, paths).schema)
    except pa.ArrowException as error:
        raise InputError(f"Input {stated} can't be read as one table: {error}. Expected equal columns.") from error
    return InputFiles(stated, filesystem, root, tuple(paths), schema, num_rows)


def _list_paths(filesystem: fsspec.AbstractFileSystem, path: str) -> tuple[str, list[str]]:
    """Where partitions begin, and the files. What is there by that name is taken before what matches it as a glob."""
    if filesystem.isdir(path):
        return path, sorted(name for name in filesystem.find(path) if _is_data_file(name, path))
    parts = path.split("/")
    if filesystem.exists(path):
        return "/".join(parts[:-1]), [path]
    patterns = [number for number, part in enumerate(parts) if any(found in part for found in _PATTERN_CHARACTERS)]
    if not patterns:
        return path, []
    return "/".join(parts[: patterns[0]]), sorted(name for name in filesystem.glob(path) if filesystem.isfile(name))


def _leave_out(paths: list[str], filesystem: fsspec.AbstractFileSystem, output: str) -> list[str]:
    where, folder = fsspec.core.url_to_fs(output)
    return paths if where != filesystem else [path for path in paths if not path.startswith(folder.rstrip("/") + "/")]


def _partitions(path: str, root: str) -> list[tuple[str, str]]:
    """Names and values that the file's folders below `root` state, as in `day=1`."""
    folders = path[len(root) :].split("/")[:-1]
    return [(name, value) for name, is_partition, value in (part.partition("=") for part in folders) if is_partition]


def _dataset(
    filesystem: fsspec.AbstractFileSystem, root: str, paths: list[str], schema: pa.Schema | None = None
) -> pads.Dataset:
    return pads.dataset(
        paths,
        schema=schema,
        format="parquet",
        filesystem=filesystem,
        partitioning="hive",
        partition_base_dir=root,
    )


def _with_partitions(schema: pa.Schema, found: pa.Schema) -> pa.Schema:
    """`schema`, and what `found`, which was made of one file and all folders, has besides."""
    return pa.schema([*schema, *(field for field in found if field.name not in schema.names)])


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


def _check_columns(schemas: dict[str, pa.Schema], root: str) -> None:
    """Raises InputError where files differ in their columns, or where a name stands for two columns."""
    first_name, first = next(iter(schemas.items()))
    repeated = sorted(name for name in set(first.names) if first.names.count(name) > 1)
    if repeated:
        raise InputError(
            f"Input file {first_name} has more than one column called {', '.join(repeated)}. Expected names that tell "
            "columns apart; rename them."
        )
    for path, schema in schemas.items():
        if _columns(schema) != _columns(first):
            raise InputError(
                f"Input files differ in their columns: {first_name} has [{_describe(first)}], {path} has "
                f"[{_describe(schema)}]. Expected the same columns and types; cast them or run two jobs."
            )
        for name, value in _partitions(path, root):
            if name in first.names:
                raise InputError(
                    f"Column '{name}' is in the input file {path} and in its folder's name, {name}={value}. Expected "
                    "one of the two: rename the folder, leave the column out of the files, or state single files, "
                    "whose folders don't count."
                )


def _columns(schema: pa.Schema) -> list[tuple[str, pa.DataType]]:
    return [(field.name, field.type) for field in schema]


def _describe(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)
