"""What this machine can run: versions, GPU, memory, disk, and the default model."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from blendserve.errors import ModelError
from blendserve.models.source import resolve_model
from blendserve.spec import DEFAULT_MODEL

_REQUIRED = ("torch", "transformers", "duckdb", "pyarrow", "pydantic")
_MIN_PYTHON = (3, 10)
_MIN_FREE_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. A required one that isn't fine means that no job can run."""

    what: str
    found: str
    is_fine: bool
    is_required: bool
    remedy: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> list[Finding]:
    """Everything, in the order in which it should be put right."""
    checks: list[Callable[[], Finding]] = [_python, *(_package(name) for name in _REQUIRED)]
    checks += [_gpu, _triton, _airflow, _memory, _disk, _model]
    return [check() for check in checks]


def _python() -> Finding:
    is_fine = sys.version_info >= _MIN_PYTHON
    return Finding("python", platform.python_version(), is_fine, True, "install Python 3.10 or newer")


def _package(name: str) -> Callable[[], Finding]:
    def check() -> Finding:
        found = _version(name)
        return Finding(name, found or "not installed", found is not None, True, f"pip install {name}")

    return check


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> Finding:
    remedy = "none is needed: jobs run on the CPU, slower; with an NVIDIA GPU install a CUDA build of torch"
    if importlib.util.find_spec("torch") is None:
        return Finding("gpu", "unknown without torch", False, False, remedy)
    import torch

    if not torch.cuda.is_available():
        return Finding("gpu", "none visible to torch", False, False, remedy)
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Finding("gpu", ", ".join(names), True, False, remedy)


def _triton() -> Finding:
    found = _version("triton")
    return Finding("triton", found or "not installed", found is not None, False, "pip install 'blendserve[gpu]'")


def _airflow() -> Finding:
    found = _version("apache-airflow")
    remedy = "pip install 'blendserve[airflow]' where DAGs run"
    return Finding("apache-airflow", found or "not installed", found is not None, False, remedy)


def _memory() -> Finding:
    free = psutil.virtual_memory().available
    found = f"{free / 2**30:.1f} GiB available"
    return Finding(
        "memory", found, free >= _MIN_FREE_BYTES, True, "free memory; a job wants 2 GiB and the model's size"
    )


def _disk() -> Finding:
    place = Path(os.environ.get("TMPDIR", "/tmp"))  # noqa: S108 - only its free space is read
    free = shutil.disk_usage(place).free
    remedy = "free space or point TMPDIR elsewhere"
    return Finding("disk", f"{free / 2**30:.1f} GiB free in {place}", free >= _MIN_FREE_BYTES, True, remedy)


def _model() -> Finding:
    try:
        return Finding(f"model {DEFAULT_MODEL}", str(resolve_model(DEFAULT_MODEL)), True, False, "")
    except ModelError as error:
        return Finding(f"model {DEFAULT_MODEL}", "not available", False, False, str(error))
