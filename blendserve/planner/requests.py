"""The job's requests as the planner sees them: one array a column, in the order of the prefix tree."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from blendserve.job_folder import JobFolder
from blendserve.planner.database import compute
from blendserve.planner.performance_model import CostConstants

_NO_COMPLETIONS = pa.schema(
    [
        ("row_index", pa.int64()),
        ("finish_reason", pa.string()),
        ("num_completion_tokens", pa.int32()),
        ("is_final", pa.bool_()),
    ]
)


@dataclass(frozen=True, slots=True)
class RequestStates:
    """All sorted requests with what is known of them; arrays [num_requests] in sorted order, NaN where unknown.

    is_cut_off: the completion was ended by a limit. is_begun: that of the sample, so that the request has to go on.
    """

    row_index: NDArray[np.int64]
    file_position: NDArray[np.int64]
    request_id: pa.ChunkedArray
    num_prompt_tokens: NDArray[np.int64]
    shared_prefix_tokens: NDArray[np.int64]
    max_tokens: NDArray[np.int64]
    hints: NDArray[np.float64]
    observed: NDArray[np.float64]
    is_cut_off: NDArray[np.bool_]
    is_duplicate: NDArray[np.bool_]
    is_completed: NDArray[np.bool_]
    is_begun: NDArray[np.bool_]

    @property
    def num_requests(self) -> int:
        return len(self.row_index)


def read_request_states(database: duckdb.DuckDBPyConnection, folder: JobFolder) -> RequestStates:
    """Join the relations of the earlier steps with the completions that exist already."""
    completed = read_completed(database, folder)
    files = {name: [folder.relation(name)] for name in ("sorted_requests", "tokenized_requests")}
    table = compute(database, "request_states", files=files, tables={"completed_requests": completed})

    def integers(name: str) -> NDArray[np.int64]:
        return np.asarray(table.column(name).to_numpy(), dtype=np.int64)

    def flags(name: str) -> NDArray[np.bool_]:
        return np.asarray(table.column(name).to_numpy(), dtype=np.bool_)

    def known(name: str) -> NDArray[np.float64]:
        return np.asarray(table.column(name).cast(pa.float64()).to_numpy(), dtype=np.float64)

    return RequestStates(
        row_index=integers("row_index"),
        file_position=integers("file_position"),
        request_id=table.column("request_id"),
        num_prompt_tokens=integers("num_prompt_tokens"),
        shared_prefix_tokens=integers("shared_prefix_tokens"),
        max_tokens=integers("max_tokens"),
        hints=known("output_tokens_hint"),
        observed=known("num_completion_tokens"),
        is_cut_off=flags("is_cut_off"),
        is_duplicate=flags("is_duplicate"),
        is_completed=flags("is_completed"),
        is_begun=flags("is_begun"),
    )


def read_completed(database: duckdb.DuckDBPyConnection, folder: JobFolder) -> pa.Table:
    """The relation `completed_requests` of the completions that exist already."""
    completions = folder.completion_files()
    if not completions:
        return _NO_COMPLETIONS.empty_table()
    tokenized = [folder.relation("tokenized_requests")]
    return compute(database, "completed_requests", files={"completions": completions, "tokenized_requests": tokenized})


def compute_costs(
    database: duckdb.DuckDBPyConnection,
    constants: CostConstants,
    *,
    num_prompt_tokens: NDArray[np.int64],
    shared_prefix_tokens: NDArray[np.int64],
    mean_output_tokens: NDArray[np.float64],
    mean_square_output_tokens: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute and memory seconds [num_requests] by the relation `request_costs`."""
    lengths = pa.table(
        {
            "row_index": np.arange(len(num_prompt_tokens)),
            "num_prompt_tokens": num_prompt_tokens,
            "shared_prefix_tokens": shared_prefix_tokens,
            "mean_output_tokens": mean_output_tokens,
            "mean_square_output_tokens": mean_square_output_tokens,
        }
    )
    costs = compute(
        database, "request_costs", parameters=asdict(constants), tables={"expected_lengths": lengths}
    ).sort_by("row_index")
    return costs.column("compute_seconds").to_numpy(), costs.column("memory_seconds").to_numpy()
