"""What there is to see of a job that has been merged: its manifest and some of its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.dataset as pads

from blendserve.errors import OutputError
from blendserve.job_folder import JobFolder
from blendserve.manifest import ShardManifest, read_json, read_manifest
from blendserve.schemas import RESULT_COLUMNS


def show(root: Path, num_rows: int) -> dict[str, Any]:
    """A finished job for a person: `rows` (evenly spread over the result), `manifest`, `real_seconds` of its shards.

    Raises OutputError when it isn't merged or its results were removed.
    """
    folder = JobFolder(root.absolute())
    manifest = read_final_manifest(folder)
    files = [folder.root / name for name in manifest["results"]]
    for path in files:
        if not path.is_file():
            raise OutputError(f"{path} is not there: results were removed. Run the job again, which makes them anew.")
    results = pads.dataset(list(map(str, files)), format="parquet", schema=RESULT_COLUMNS)
    total = results.count_rows()
    num_rows = min(num_rows, total)
    rows = results.take([position * total // num_rows for position in range(num_rows)]).to_pylist()
    shards = [read_manifest(path, ShardManifest) for path in sorted(folder.completions.glob("shard-*/shard.json"))]
    return {"rows": rows, "manifest": manifest, "real_seconds": sum(shard.seconds for shard in shards)}


def is_finished(folder: JobFolder) -> bool:
    """Whether the job was declared done and its results are all there still."""
    if not (folder.success.is_file() and folder.manifest.is_file()):
        return False
    return all((folder.root / name).is_file() for name in read_json(folder.manifest)["results"])


def read_final_manifest(folder: JobFolder) -> dict[str, Any]:
    """`manifest.json`. Raises OutputError when the job isn't merged."""
    if not folder.manifest.is_file():
        raise OutputError(
            f"{folder.manifest} is not there: the job in {folder.root} is not merged yet. Run merge first."
        )
    return read_json(folder.manifest)
