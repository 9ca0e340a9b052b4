"""Reads one shard's scheduled requests as the scheduler asks for them, a few row groups in memory at a time."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from blendserve.dual_scanner import DualScanner
from blendserve.engine.request import Completion, FinishReason, Request
from blendserve.engine.sampler import request_seed
from blendserve.errors import PlanError
from blendserve.known_lengths import KnownLengths
from blendserve.length_learning import KNOWN, LEARNING_KEY, LengthLearner, ObservedLengths, ShardLengths
from blendserve.schemas import SCHEDULED_REQUESTS

# Prompts that are kept in memory: what lies around two fronts, and units from elsewhere in the file where what has been
# learnt of lengths has put them in another order.
_MAX_KEPT_TOKENS = 2**25


def max_completion_tokens(path: Path) -> int:
    """The most output tokens that all requests of a shard file may take. Raises PlanError when it isn't one."""
    return int(pc.sum(_open_shard(path).read(columns=["max_tokens"]).column("max_tokens")).as_py() or 0)


class ShardReader:
    """The requests of a shard file that still have to run, in the file's order: position 0 is the first of them."""

    def __init__(
        self,
        path: Path,
        *,
        seed: int,
        is_two_ended: bool,
        done_rows: Collection[int],
        guests: Sequence[Request] = (),
    ) -> None:
        """done_rows: row_index of the requests that need not run. guests: requests of earlier shards that will run on
        beside these once they have their `place`.

        Raises PlanError when the file isn't a shard.
        """
        self._file = _open_shard(path)
        self._seed = seed
        metadata = self._file.metadata
        row_counts = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
        self._group_starts = np.concatenate(([0], np.cumsum(row_counts, dtype=np.int64)))
        self._groups: OrderedDict[int, list[dict[str, Any]]] = OrderedDict()
        self._kept_tokens = 0
        self.row_indices = self._numbers("row_index").astype(np.int64)  # of all requests in the file
        self._remaining = np.flatnonzero(~np.isin(self.row_indices, list(done_rows)))
        self.remaining_row_indices = self.row_indices[self._remaining]  # of those that still have to run
        self.compute_seconds = self._numbers("compute_seconds")[self._remaining]
        self.memory_seconds = self._numbers("memory_seconds")[self._remaining]
        self._max_tokens = self._numbers("max_tokens")[self._remaining].astype(np.int64)
        self.scanner = DualScanner(
            compute_seconds=self.compute_seconds,
            memory_seconds=self.memory_seconds,
            unit_density=self._numbers("unit_density")[self._remaining],
            is_two_ended=is_two_ended,
        )
        self._position = {row: position for position, row in enumerate(self.remaining_row_indices.tolist())}
        lengths = self._read_lengths() if is_two_ended else None
        self.learner = None if lengths is None else LengthLearner(_with_guests(lengths, guests), self.scanner)
        self.lengths = self._known_lengths() if is_two_ended and self.learner is None else None

    def place(self, guests: Sequence[Request]) -> None:
        """Give the guests the positions behind the requests of this shard, beside which they run from now on."""
        for position, guest in enumerate(guests, start=len(self._remaining)):
            guest.position = position

    def position_of(self, row_index: int) -> int:
        """Where the request of this row stands in the scanner."""
        return self._position[row_index]

    def has(self, row_index: int) -> bool:
        """Whether the request of this row is one of those that still had to run."""
        return row_index in self._position

    def finish(self, completion: Completion) -> None:
        """Learn from how long a request has become."""
        if self.learner and completion.finish_reason is not FinishReason.ERROR:
            is_cut_off = completion.finish_reason is FinishReason.LENGTH
            position = self.position_of(completion.row_index)
            self.learner.finish(position, len(completion.token_ids), is_cut_off=is_cut_off)

    @property
    def num_requests(self) -> int:
        """Requests that still have to run."""
        return len(self._remaining)

    def request(self, position: int) -> Request:
        """The request at a position of the admission order."""
        file_row = int(self._remaining[position])
        group = int(np.searchsorted(self._group_starts, file_row, side="right")) - 1
        row = self._group(group)[file_row - int(self._group_starts[group])]
        estimate = row["estimated_output_tokens"]
        request = Request(
            position=position,
            row_index=row["row_index"],
            request_id=row["request_id"],
            prompt_token_ids=row["prompt_token_ids"].copy(),  # a view would keep its whole row group in memory
            max_tokens=row["max_tokens"],
            estimated_output_tokens=estimate if self.learner is None else int(self.learner.estimated_tokens[position]),
            seed=request_seed(self._seed, row["request_id"]),
        )
        request.output_token_ids = row["generated_token_ids"] or []
        return request

    def _group(self, index: int) -> list[dict[str, Any]]:
        """The rows of a row group, from those that are kept; prompts as int32 arrays."""
        if index in self._groups:
            self._groups.move_to_end(index)
            return self._groups[index]
        columns = ["row_index", "request_id", "max_tokens", "estimated_output_tokens", "generated_token_ids"]
        table = self._file.read_row_group(index, columns=[*columns, "prompt_token_ids"])
        prompts = table.column("prompt_token_ids")
        rows: list[dict[str, Any]] = table.select(columns).to_pylist()
        for row, prompt in zip(rows, prompts, strict=True):
            row["prompt_token_ids"] = prompt.values.to_numpy()
        self._groups[index] = rows
        self._kept_tokens += len(prompts.combine_chunks().flatten())
        while self._kept_tokens > _MAX_KEPT_TOKENS and len(self._groups) > 1:
            _, oldest = self._groups.popitem(last=False)
            self._kept_tokens -= sum(len(row["prompt_token_ids"]) for row in oldest)
        return rows

    def _read_lengths(self) -> ShardLengths | None:
        """What there is to learn output lengths from; None where the plan knows them or says nothing of them."""
        common = (self._file.schema_arrow.metadata or {}).get(LEARNING_KEY)
        if common is None or len(self._remaining) == 0:
            return None
        known = json.loads(common)
        classes = self._file.read(columns=["length_classes"]).column(0).combine_chunks()
        num_levels = len(classes) and len(classes.flatten()) // len(classes)
        seen = np.array(known["classes"], dtype=np.int32).reshape(-1, num_levels)
        shared = self._numbers("shared_prefix_tokens")[self._remaining] * (1 - 1 / known["prefix_readers"])
        lengths = ShardLengths(
            classes=classes.flatten().to_numpy().reshape(-1, num_levels)[self._remaining],
            estimated_tokens=self._numbers("estimated_output_tokens")[self._remaining].astype(np.int64),
            max_tokens=self._max_tokens,
            kv_prompt_tokens=np.rint(self._numbers("num_prompt_tokens")[self._remaining] - shared).astype(np.int64),
            unit_id=self._numbers("unit_id")[self._remaining].astype(np.int64),
            compute_seconds=self.compute_seconds,
            memory_seconds=self.memory_seconds,
            seconds_per_prompt_token=known["seconds_per_layer_token"],
            seconds_per_decode_token=known["seconds_per_layer_token"] + known["seconds_per_sampled_token"],
            seconds_per_kv_token=known["seconds_per_kv_token"],
            observed=ObservedLengths(
                seen, np.array(known["num_tokens"], np.int64), np.array(known["is_cut_off"], np.bool_)
            ),
        )
        return lengths if lengths.is_learnable else None

    def _known_lengths(self) -> KnownLengths:
        def numbers(column: str) -> NDArray[np.int64]:
            return self._numbers(column)[self._remaining].astype(np.int64)

        return KnownLengths(
            prompt_tokens=numbers("num_prompt_tokens"),
            output_tokens=np.minimum(numbers("estimated_output_tokens"), self._max_tokens),
            shared_tokens=numbers("shared_prefix_tokens"),
        )

    def _numbers(self, column: str) -> NDArray[np.float64]:
        values: NDArray[np.float64] = self._file.read(columns=[column]).column(column).to_numpy()
        return values


def _open_shard(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise PlanError(f"Shard {path} can't be read: {error}. Make the plan again.") from error
    if file.schema_arrow.names != SCHEDULED_REQUESTS.names:
        raise PlanError(
            f"Shard {path}: expected the columns {', '.join(SCHEDULED_REQUESTS.names)}, "
            f"got {', '.join(file.schema_arrow.names)}. It was written by another version; plan again."
        )
    return file


def _with_guests(shard: ShardLengths, guests: Sequence[Request]) -> ShardLengths:
    """With requests behind the others whose lengths aren't learnt here: what was learnt of them last stays."""
    num_guests = len(guests)
    zeros, ones = np.zeros(num_guests), np.ones(num_guests, dtype=np.int64)
    estimated = np.array([guest.estimated_output_tokens for guest in guests], dtype=np.int64)
    return replace(
        shard,
        classes=np.concatenate([shard.classes, np.full((num_guests, shard.classes.shape[1]), KNOWN, dtype=np.int32)]),
        estimated_tokens=np.concatenate([shard.estimated_tokens, estimated]),
        max_tokens=np.concatenate([shard.max_tokens, ones]),
        kv_prompt_tokens=np.concatenate([shard.kv_prompt_tokens, ones]),
        unit_id=np.concatenate([shard.unit_id, ones * shard.unit_id[0]]),
        compute_seconds=np.concatenate([shard.compute_seconds, zeros]),
        memory_seconds=np.concatenate([shard.memory_seconds, zeros]),
    )
