"""The running requests' state as arrays, a row for each, so that a step's bookkeeping takes a few array operations.

Counts run ahead of the device: a token counts as generated from the moment that its step is planned, as known once its
value has come back. Knows nothing of blocks or batches.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from blendserve.dual_scanner import Front
from blendserve.engine.invariants import require
from blendserve.engine.request import Request, expected_output_tokens

IntArray = NDArray[np.int64]


class RunningRequests:
    """Rows 0 .. max_num_seqs - 1. All arrays are int64 [max_num_seqs] unless said otherwise.

    A row goes through three states: prefilling, decoding, and draining, when its last token is planned but not known
    yet. It is active in the first two: then it holds blocks.
    """

    def __init__(self, max_num_seqs: int) -> None:
        def zeros() -> IntArray:
            return np.zeros(max_num_seqs, dtype=np.int64)

        self.requests: list[Request | None] = [None] * max_num_seqs
        self.serials = zeros()  # the number of the admission that holds the row, from 1 in their order; 0: free
        self.is_active = np.zeros(max_num_seqs, dtype=np.bool_)
        self.is_decoding = np.zeros(max_num_seqs, dtype=np.bool_)
        self.context_tokens = zeros()  # stored in the KV cache by the steps planned so far
        self.room_tokens = zeros()  # that its blocks hold
        self.prompt_tokens = zeros()
        self.prefill_tokens = zeros()
        self.shared_tokens = zeros()
        self.generated_tokens = zeros()
        self.known_tokens = zeros()
        self.max_tokens = zeros()
        self.estimated_tokens = zeros()
        self.seeds = zeros()
        self._is_right = np.zeros(max_num_seqs, dtype=np.bool_)  # admitted at the right front
        self._output_token_ids = np.zeros((max_num_seqs, 64), dtype=np.int32)  # [row, token], widened as needed
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._num_admitted = 0

    @property
    def has_free_row(self) -> bool:
        return bool(self._free_rows)

    @property
    def num_rows(self) -> int:
        """Rows that are taken, draining ones included."""
        return len(self.requests) - len(self._free_rows)

    @property
    def num_active(self) -> int:
        return int(np.count_nonzero(self.is_active))

    def active_rows(self) -> IntArray:
        return np.flatnonzero(self.is_active)

    def decoding_rows(self) -> IntArray:
        return np.flatnonzero(self.is_decoding)

    def request(self, row: int) -> Request:
        request = self.requests[row]
        if request is None:
            require(False, f"row {row} has a request")
            raise AssertionError
        return request

    def admit(self, request: Request, max_tokens: int) -> int:
        """Give a request a row; what it generated before a preemption is known. max_tokens: its completion's limit."""
        row = self._free_rows.pop()
        self._num_admitted += 1
        num_known = len(request.output_token_ids)
        self._widen(num_known)
        self._output_token_ids[row, :num_known] = request.output_token_ids
        self.requests[row] = request
        self.serials[row] = self._num_admitted
        self.is_active[row] = True
        self.is_decoding[row] = False
        self.context_tokens[row] = self.room_tokens[row] = self.shared_tokens[row] = 0
        self.prompt_tokens[row] = request.num_prompt_tokens
        self.prefill_tokens[row] = request.num_tokens
        self.generated_tokens[row] = self.known_tokens[row] = num_known
        self.max_tokens[row] = max_tokens
        self.estimated_tokens[row] = max(request.estimated_output_tokens, 1)
        self.seeds[row] = request.seed
        self._is_right[row] = request.front is Front.RIGHT
        return row

    def free(self, row: int) -> None:
        """Take a row's request out; its known tokens go with it."""
        request = self.request(row)
        request.output_token_ids = self._output_token_ids[row, : self.known_tokens[row]].tolist()
        self.requests[row] = None
        self.serials[row] = 0
        self.is_active[row] = self.is_decoding[row] = False
        self._free_rows.append(row)

    def plan_token(self, rows: IntArray) -> IntArray:
        """Count one more generated token for each row. Returns the rows whose last one this is: they drain from now."""
        self.generated_tokens[rows] += 1
        drained = rows[self.generated_tokens[rows] >= self.max_tokens[rows]]
        self.is_active[drained] = self.is_decoding[drained] = False
        return drained

    def record(self, rows: IntArray, token_ids: NDArray[np.int32]) -> None:
        """Take in the value of each row's next planned token."""
        position = self.known_tokens[rows]
        self._widen(int(position.max(initial=0)) + 1)
        self._output_token_ids[rows, position] = token_ids
        self.known_tokens[rows] += 1

    def output_token_ids(self, row: int) -> list[int]:
        """The row's known tokens."""
        ids: list[int] = self._output_token_ids[row, : self.known_tokens[row]].tolist()
        return ids

    def num_tokens(self, rows: IntArray) -> IntArray:
        """Prompt and generated tokens."""
        return self.prompt_tokens[rows] + self.generated_tokens[rows]

    def remaining_output_tokens(self, rows: IntArray) -> IntArray:
        """Tokens that each is still expected to generate, at least one; see `expected_output_tokens`."""
        generated = self.generated_tokens[rows]
        expected = expected_output_tokens(generated, self.estimated_tokens[rows])
        return np.maximum(np.minimum(expected, self.max_tokens[rows]) - generated, 1)

    def is_right(self, rows: IntArray) -> NDArray[np.bool_]:
        """Which count for the right front: those from there, and those that have outlived their estimate."""
        return self._is_right[rows] | (self.generated_tokens[rows] > self.estimated_tokens[rows])

    def expect(self, rows: IntArray, output_tokens: IntArray) -> None:
        """Expect other lengths in all; what has outlived its estimate goes on counting for the right front."""
        self._is_right[rows] = self.is_right(rows)
        self.estimated_tokens[rows] = np.maximum(output_tokens, 1)
        for row, tokens in zip(rows.tolist(), self.estimated_tokens[rows].tolist(), strict=True):
            self.request(row).estimated_output_tokens = tokens  # for when it is preempted

    def footprint_tokens(self, rows: IntArray) -> NDArray[np.float64]:
        """KV cache tokens that each alone holds, averaged over its life: p - shared + d / 2."""
        output_tokens = self.generated_tokens[rows] + self.remaining_output_tokens(rows)
        return self.prompt_tokens[rows] - self.shared_tokens[rows] + output_tokens / 2

    def _widen(self, num_tokens: int) -> None:
        width = self._output_token_ids.shape[1]
        if num_tokens > width:
            wider = np.zeros((len(self.requests), max(num_tokens, 2 * width)), dtype=np.int32)
            wider[:, :width] = self._output_token_ids
            self._output_token_ids = wider
