"""How a step of a job knows that it is done, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from blendserve.job_folder import JobFolder
from blendserve.job_record import writing_to
from blendserve.manifest import read_json, write_manifest


@contextmanager
def step(folder: JobFolder, name: str, *relations: str) -> Iterator[bool]:
    """Yield whether the step's relations are all there; time the step when it has to run.

    Raises OutputError when the step can't write.
    """
    if relations and all(folder.relation(relation).is_file() for relation in relations):
        yield True
        return
    started = time.perf_counter()
    with writing_to(folder.root):
        yield False
    write_manifest(folder.timings, {**timings(folder), name: round(time.perf_counter() - started, 3)})


def timings(folder: JobFolder) -> dict[str, float]:
    """Seconds by step, of the last time that each one had to run."""
    return read_json(folder.timings) if folder.timings.is_file() else {}
