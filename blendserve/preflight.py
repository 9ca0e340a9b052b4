"""All that can be checked before any work starts: input, columns, template, model, hardware, output folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from blendserve.extract import RequestReader
from blendserve.input_files import InputFiles, open_input
from blendserve.job_folder import JobFolder
from blendserve.job_record import JobRecord, check_claimable
from blendserve.models.config import ModelConfig
from blendserve.models.source import resolve_model
from blendserve.planner.planned_engine import plan_hardware
from blendserve.query import QueriedFiles, queried
from blendserve.spec import JobSpec


@dataclass(frozen=True, slots=True)
class ExaminedJob:
    """A job that passed every check, with what was found, so that nothing is read or hashed twice."""

    folder: JobFolder
    files: InputFiles | QueriedFiles
    record: JobRecord
    architecture: str


def examine(spec: JobSpec, root: Path | None = None) -> ExaminedJob:
    """Check the job; `root` is where its output folder lies for now, when `spec.output` is no local folder.

    Raises InputError, UsageError, ModelError or OutputError; changes nothing but creating the output folder.
    """
    opened = open_input(spec.input, output=spec.output)
    files = opened if spec.sql is None else queried(opened, spec.sql)
    RequestReader.of(spec, files.schema)
    model_folder = resolve_model(spec.model, needs_weights=spec.load_format != "dummy")
    architecture = ModelConfig.load(model_folder).architecture
    plan_hardware(spec, model_folder)  # which names what is unknown or of another model
    folder = JobFolder(root or Path(spec.output).absolute())
    record = JobRecord.of(spec, files, model_folder)
    check_claimable(folder, record)
    return ExaminedJob(folder, files, record, architecture)
