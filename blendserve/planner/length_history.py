"""Output lengths of earlier runs of the same job: a small table beside the output folder, so that a job that runs every
night needs no sample after the first one.

The table's name is a hash of what decides how long answers are: model, template and the other prompt options, and
sampling, but neither input nor seed. Runs with other templates have other tables.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Final

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from blendserve.job_folder import JobFolder
from blendserve.manifest import read_json
from blendserve.planner.database import compute, open_database, write_relation
from blendserve.planner.output_lengths import RememberedLengths
from blendserve.planner.requests import RequestStates, read_completed
from blendserve.schemas import OUTPUT_LENGTH_HISTORY

_FOLDER: Final = ".blendserve"
_NOT_ABOUT_LENGTHS: Final = ("seed", "limit", "id_column")
_NUM_COMPARED: Final = 16  # tokens after what all prompts share; enough to tell templates apart
_REMEMBERED: Final = 0.5  # what a run counts in the next one, so that a change shows after a few
_LEAST_REQUESTS: Final = 2.0
_MOST_CLASSES: Final = 10_000

log = logging.getLogger(__name__)


def history_file(folder: JobFolder) -> Path | None:
    """Where the history of jobs like that in `folder` lies; None where there is no job or its output is a URL."""
    if not folder.job.is_file():
        return None
    record = read_json(folder.job)
    output = str(record["spec"]["output"])
    if "://" in output:
        return None
    about = {
        part: {
            name: value for name, value in record["identity"].get(part, {}).items() if name not in _NOT_ABOUT_LENGTHS
        }
        for part in ("model", "prompts", "sampling")
    }
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    return folder.root.parent / _FOLDER / f"output_lengths-{key}.parquet"


def recall(database: duckdb.DuckDBPyConnection, folder: JobFolder, states: RequestStates) -> RememberedLengths | None:
    """What earlier runs say of the requests in `states`, or None where there were none."""
    history = history_file(folder)
    if history is None or states.num_requests == 0:
        return None
    earlier_runs = _read_history(history)
    if earlier_runs is None:
        return None
    tables = {
        "earlier_runs": earlier_runs,
        "request_classes": _classes(database, folder, states.shared_prefix_tokens),
    }
    found = compute(database, "remembered_lengths", tables=tables)
    places = np.searchsorted(found.column("row_index").to_numpy(), states.row_index)
    mean, square = (found.column(f"mean_{name}output_tokens").to_numpy()[places] for name in ("", "square_"))
    return RememberedLengths(mean, square)


def remember(folder: JobFolder) -> None:
    """Add the output lengths of the job's finished requests to the history of jobs like it.

    A history that can't be written is no reason to fail a job that is done: it is logged, and the next run samples.
    """
    history = history_file(folder)
    if history is None:
        return
    try:
        with open_database(folder.work) as database:
            sorted_requests = pq.read_table(folder.relation("sorted_requests"), columns=["shared_prefix_tokens"])
            shared = sorted_requests.column(0).to_numpy().astype(np.int64)
            tables = {
                "completed_requests": read_completed(database, folder),
                "request_classes": _classes(database, folder, shared),
                "earlier_runs": _read_history(history) or OUTPUT_LENGTH_HISTORY.empty_table(),
            }
            parameters = {
                "remembered": _REMEMBERED,
                "least_requests": _LEAST_REQUESTS,
                "most_classes": _MOST_CLASSES,
            }
            table = compute(database, "output_length_history", parameters=parameters, tables=tables)
        write_relation(history, table, OUTPUT_LENGTH_HISTORY)
    except OSError as error:
        log.warning("Output lengths are not remembered for the next run: %s can't be written: %s", history, error)


def _read_history(history: Path) -> pa.Table | None:
    """None where there is none; a damaged one is logged and counts as none, so that the next run writes it anew."""
    if not history.is_file():
        return None
    try:
        return pq.read_table(history).select(OUTPUT_LENGTH_HISTORY.names).cast(OUTPUT_LENGTH_HISTORY)
    except (pa.ArrowException, KeyError, OSError, ValueError) as error:
        log.warning("Output lengths of earlier runs are not used: %s can't be read: %s", history, error)
        return None


def _classes(
    database: duckdb.DuckDBPyConnection, folder: JobFolder, shared_prefix_tokens: NDArray[np.int64]
) -> pa.Table:
    parameters = {
        "num_shared": int(shared_prefix_tokens[1:].min(initial=int(shared_prefix_tokens.max(initial=0)))),
        "num_compared": _NUM_COMPARED,
    }
    files = {"tokenized_requests": [folder.relation("tokenized_requests")]}
    return compute(database, "request_classes", parameters=parameters, files=files)
