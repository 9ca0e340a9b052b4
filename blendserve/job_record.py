"""What makes two runs the same job, and how a job takes hold of its output folder.

Invariants: a folder that isn't ours is never written to; work of another job is never mixed in; only `force` discards.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blendserve.errors import OutputError
from blendserve.file_store import open_store
from blendserve.input_files import InputFiles
from blendserve.job_folder import JobFolder
from blendserve.lease import Lease, acquire_lease
from blendserve.manifest import FrozenManifest, read_json, read_manifest, write_manifest
from blendserve.models.source import model_identity
from blendserve.spec import JobSpec, RowErrorPolicy, SamplingSpec

if TYPE_CHECKING:
    from blendserve.query import QueriedFiles

# Fields that decide which prompts the model sees. Together with input, model and sampling they are the job's identity;
# policy, shards and the like only decide how it runs.
_PROMPT_FIELDS = (
    "sql",
    "id_column",
    "prompt_column",
    "template",
    "system",
    "raw",
    "truncate_prompt",
    "limit",
    "max_model_len",
)
_NUMERIC_FIELDS = ("dtype", "load_format", "deterministic")
_FULL_BYTES = 1 << 20
_PACKAGES = ("blendserve", "torch", "triton", "transformers", "duckdb", "pyarrow")


class JobRecord(FrozenManifest):
    """`job.json`: the job as stated and what identifies it."""

    spec: JobSpec
    model_folder: str
    identity: dict[str, Any]
    fingerprint: str
    begun_by: str | None = None  # Airflow's run, as DAG/run

    @classmethod
    def of(cls, spec: JobSpec, files: InputFiles | QueriedFiles, model_folder: Path) -> JobRecord:
        identity = {
            "input": files.digest(),
            "model": model_identity(model_folder) | {name: getattr(spec, name) for name in _NUMERIC_FIELDS},
            "prompts": {name: getattr(spec, name) for name in _PROMPT_FIELDS},
            "sampling": {name: getattr(spec, name) for name in SamplingSpec.model_fields},
        }
        identity = json.loads(json.dumps(identity))  # as it will be read back
        content = json.dumps(identity, sort_keys=True).encode()
        fingerprint = hashlib.sha256(content).hexdigest()
        return cls(spec=spec, model_folder=str(model_folder), identity=identity, fingerprint=fingerprint)


def read_record(folder: JobFolder) -> JobRecord:
    """Raises OutputError when the folder holds no job."""
    if not folder.job.is_file():
        raise OutputError(f"{folder.root} holds no job: {folder.job.name} is not there. Give the output of a job.")
    return read_manifest(folder.job, JobRecord)


def claim(folder: JobFolder, record: JobRecord) -> None:
    """Make the folder this job's own, keeping what an earlier run of the same job did.

    `force` discards that, but once only in a run that has a name: its steps may be retried and cleared.

    Raises OutputError when the folder can't be written, isn't ours, or holds another job and `force` is off; or when
    `force` is on and what it holds can't be removed.
    """
    check_claimable(folder, record)
    earlier = read_record(folder) if folder.job.is_file() else None
    if record.spec.force and not _has_begun(record, earlier):
        _discard(folder)
    elif folder.success.is_file():
        _restate(folder, record.spec.on_row_error)
        return
    elif earlier is not None:
        if _planning_options(earlier.spec) != _planning_options(record.spec):
            _drop_plans(folder)
        record = record.model_copy(update={"begun_by": earlier.begun_by})
    with writing_to(folder.root):
        write_manifest(folder.job, record)


def check_claimable(folder: JobFolder, record: JobRecord) -> None:
    """`claim` without changing anything but creating the folder itself."""
    probe = folder.root / ".writable"
    with writing_to(folder.root):
        folder.root.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.root.iterdir()}
    if not folder.job.is_file():
        foreign = sorted(names - {folder.leases.name, probe.name})
        if foreign:
            raise OutputError(
                f"Output folder {folder.root} is not empty and holds no job of ours ({', '.join(foreign[:5])}"
                f"{', …' if len(foreign) > 5 else ''}). Give a new or empty folder; nothing was touched."
            )
    with writing_to(folder.root):
        probe.touch()
        probe.unlink(missing_ok=True)  # another run may have looked at the same moment
    if not folder.job.is_file():
        return
    earlier = read_record(folder)
    if earlier.fingerprint != record.fingerprint and not record.spec.force:
        changed = [name for name in record.identity if record.identity[name] != earlier.identity.get(name)]
        raise OutputError(
            f"Output folder {folder.root} holds another job: {', '.join(changed)} changed since "
            f"(fingerprint {earlier.fingerprint[:12]}, now {record.fingerprint[:12]}). Give another --output, or "
            "--force to discard what is there."
        )


def _has_begun(record: JobRecord, earlier: JobRecord | None) -> bool:
    """Whether the job that the folder holds is this very job, begun by the same run."""
    if earlier is None or record.begun_by is None:
        return False
    return (earlier.begun_by, earlier.fingerprint) == (record.begun_by, record.fingerprint)


def _planning_options(spec: JobSpec) -> dict[str, Any]:
    return spec.model_dump(exclude={"input", "output", "force", "on_row_error"})


def _restate(folder: JobFolder, on_row_error: RowErrorPolicy) -> None:
    """Of a job that is done only what failed rows mean may still change: that decides how the next run of it ends."""
    if read_record(folder).spec.on_row_error == on_row_error:
        return
    with writing_to(folder.root):
        for path in (folder.job, folder.manifest):
            content = read_json(path)
            content["spec"]["on_row_error"] = on_row_error
            write_manifest(path, content)


def _drop_plans(folder: JobFolder) -> None:
    """Let what is left to run be planned with the options of now; finished rows stay, and so does a finished sample."""
    with writing_to(folder.root):
        (folder.plan / "plan.json").unlink(missing_ok=True)
        if not any(folder.completions.glob("sample/*/shard.json")):
            (folder.sample / "plan.json").unlink(missing_ok=True)


def _discard(folder: JobFolder) -> None:
    """Raises OutputError when something can't be removed: left there, it would pass as the new job's work."""
    plans = (folder.plan / "plan.json", folder.sample / "plan.json")
    with writing_to(folder.root):
        for path in (folder.success, folder.manifest, folder.report, *plans):
            path.unlink(missing_ok=True)
        for path in (folder.results, folder.plan, folder.sample, folder.completions, folder.work):
            if path.exists():
                shutil.rmtree(path)


@contextmanager
def holding(place: str | Path, *, wait_seconds: float = 0.0) -> Iterator[Lease]:
    """Hold the job in the folder or at the URL `place`, so that two runs of it can't work there at once.

    Raises InUseError when another process holds it, and still does after `wait_seconds`.
    """
    with writing_to(Path(place)):
        lease = acquire_lease(open_store(place), f"Output folder {place}", wait_seconds=wait_seconds)
    with lease:
        yield lease


@contextmanager
def writing_to(root: Path) -> Iterator[None]:
    """Turn a refused or failed write below `root` into an OutputError that says what to do."""
    try:
        yield
    except OSError as error:
        # NumPy reports a short write without an error number: then the disk itself says whether it's full.
        has_no_room = error.errno is None and shutil.disk_usage(root).free < _FULL_BYTES
        if has_no_room or error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"The disk of {root} is full ({error}). Finished work is kept; free space and run again."
            ) from error
        raise OutputError(
            f"Output folder {root} can't be written: {error}. Choose a folder you may write to."
        ) from error


def versions() -> dict[str, str]:
    """The versions that a result depends on, by package; a package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
