"""Reads one shard's scheduled requests as the scheduler asks for them, a few row groups in memory at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from blendserve.dual_scanner import DualScanner
from blendserve.engine.request import Request
from blendserve.engine.sampler import request_seed
from blendserve.errors import PlanError
from blendserve.schemas import SCHEDULED_REQUESTS

# Two fronts, each with the row group it stands in and the next one, which is read ahead for pinning.
_MAX_ROW_GROUPS = 4


class ShardReader:
    """The requests of a shard file that still have to run, in the file's order: position 0 is the first of them."""

    def __init__(self, path: Path, *, seed: int, is_two_ended: bool, done_rows: Collection[int]) -> None:
        """done_rows: row_index of the requests that need not run. Raises PlanError when the file isn't a shard."""
        try:
            self._file = pq.ParquetFile(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise PlanError(f"Shard {path} can't be read: {error}. Make the plan again.") from error
        if self._file.schema_arrow.names != SCHEDULED_REQUESTS.names:
            raise PlanError(
                f"Shard {path}: expected the columns {', '.join(SCHEDULED_REQUESTS.names)}, "
                f"got {', '.join(self._file.schema_arrow.names)}. It was written by another version; plan again."
            )
        self.is_two_ended = is_two_ended
        self._seed = seed
        metadata = self._file.metadata
        row_counts = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
        self._group_starts = np.concatenate(([0], np.cumsum(row_counts, dtype=np.int64)))
        self._groups: OrderedDict[int, list[dict[str, Any]]] = OrderedDict()
        self.row_indices = self._numbers("row_index").astype(np.int64)  # of all requests in the file
        self._remaining = np.flatnonzero(~np.isin(self.row_indices, list(done_rows)))
        self.remaining_row_indices = self.row_indices[self._remaining]  # of those that still have to run
        self.compute_seconds = self._numbers("compute_seconds")[self._remaining]
        self.memory_seconds = self._numbers("memory_seconds")[self._remaining]
        self.max_completion_tokens = int(self._numbers("max_tokens")[self._remaining].sum())
        self.scanner = DualScanner(
            compute_seconds=self.compute_seconds,
            memory_seconds=self.memory_seconds,
            unit_density=self._numbers("unit_density")[self._remaining],
            is_two_ended=is_two_ended,
        )

    @property
    def num_requests(self) -> int:
        """Requests that still have to run."""
        return len(self._remaining)

    def request(self, position: int) -> Request:
        """The request at a position of the admission order."""
        file_row = int(self._remaining[position])
        group = int(np.searchsorted(self._group_starts, file_row, side="right")) - 1
        row = self._group(group)[file_row - int(self._group_starts[group])]
        return Request(
            position=position,
            row_index=row["row_index"],
            request_id=row["request_id"],
            prompt_token_ids=row["prompt_token_ids"].copy(),  # a view would keep its whole row group in memory
            max_tokens=row["max_tokens"],
            estimated_output_tokens=row["estimated_output_tokens"],
            seed=request_seed(self._seed, row["request_id"]),
        )

    def _group(self, index: int) -> list[dict[str, Any]]:
        """The rows of a row group, from the few that are kept; prompts as int32 arrays."""
        if index in self._groups:
            self._groups.move_to_end(index)
            return self._groups[index]
        columns = ["row_index", "request_id", "max_tokens", "estimated_output_tokens"]
        table = self._file.read_row_group(index, columns=[*columns, "prompt_token_ids"])
        prompts = table.column("prompt_token_ids")
        rows: list[dict[str, Any]] = table.select(columns).to_pylist()
        for row, prompt in zip(rows, prompts, strict=True):
            row["prompt_token_ids"] = prompt.values.to_numpy()
        self._groups[index] = rows
        if len(self._groups) > _MAX_ROW_GROUPS:
            self._groups.popitem(last=False)
        return rows

    def _numbers(self, column: str) -> NDArray[np.float64]:
        values: NDArray[np.float64] = self._file.read(columns=[column]).column(column).to_numpy()
        return values
