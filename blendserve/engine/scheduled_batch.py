"""One planned step, as the scheduler hands it to the model runner."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from blendserve.engine.kv_cache import BlockCopy
from blendserve.engine.request import Request
from blendserve.engine.running import IntArray


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Tokens [start, start + num_tokens) of a request. `is_last`: its first (or next) token is sampled after it."""

    request: Request
    row: int
    start: int
    num_tokens: int
    is_last: bool

    @property
    def token_ids(self) -> NDArray[np.int32]:
        return self.request.token_slice(self.start, self.start + self.num_tokens)


@dataclass(frozen=True, slots=True)
class TableChange:
    """Blocks that a row's block table has from entry `first` on."""

    row: int
    first: int
    blocks: list[int]


def _no_rows() -> IntArray:
    return np.zeros(0, dtype=np.int64)


@dataclass(slots=True)
class ScheduledBatch:
    """One step: rows that decode one token each, and prefill chunks. `failed`: requests that can never run, why.

    `sampled_rows` get a token from this step, in the order of their logits: the decodes, then the last chunks.
    `sampled_positions` is how many tokens each had generated before; `sampled_serials` tells later whether a row is
    still the same request's.
    """

    decode_rows: IntArray = field(default_factory=_no_rows)
    decode_positions: IntArray = field(default_factory=_no_rows)  # of the token that goes in: its place in the context
    prefills: list[PrefillChunk] = field(default_factory=list)
    sampled_rows: IntArray = field(default_factory=_no_rows)
    sampled_serials: IntArray = field(default_factory=_no_rows)
    sampled_positions: IntArray = field(default_factory=_no_rows)
    sampled_seeds: IntArray = field(default_factory=_no_rows)
    table_changes: list[TableChange] = field(default_factory=list)
    block_copies: list[BlockCopy] = field(default_factory=list)  # to be made before the step runs
    failed: list[tuple[Request, str]] = field(default_factory=list)
    num_prefill_tokens: int = 0
    num_cached_tokens: int = 0
    num_preempted: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.decode_rows) + self.num_prefill_tokens
