"""A request on its way through the engine, and the completion that it ends as."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from blendserve.dual_scanner import Front


class FinishReason(str, Enum):
    """How a completion ended: a stop token or string, the token limit, or an error."""

    STOP = "stop"
    LENGTH = "length"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Completion:
    """What a request ended as. `token_ids` holds every generated token, a final end-of-text token included.

    prompt_token_ids: int32 [num_prompt_tokens].
    """

    row_index: int
    request_id: str
    text: str | None
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    error: str | None
    num_prompt_tokens: int
    num_cached_tokens: int
    prompt_token_ids: NDArray[np.int32] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, request: Request, reason: FinishReason, text: str) -> Completion:
        """What `request` has generated, as its completion."""
        return cls(
            row_index=request.row_index,
            request_id=request.request_id,
            text=text,
            token_ids=tuple(request.output_token_ids),
            finish_reason=reason,
            error=None,
            num_prompt_tokens=request.num_prompt_tokens,
            num_cached_tokens=request.num_cached_tokens,
            prompt_token_ids=request.prompt_token_ids,
        )

    @classmethod
    def failed(cls, request: Request, error: str) -> Completion:
        """An error. Tokens generated before it are not given out: they would look like an answer."""
        return cls(
            row_index=request.row_index,
            request_id=request.request_id,
            text=None,
            token_ids=(),
            finish_reason=FinishReason.ERROR,
            error=error,
            num_prompt_tokens=request.num_prompt_tokens,
            num_cached_tokens=request.num_cached_tokens,
            prompt_token_ids=request.prompt_token_ids,
        )


def expected_output_tokens(generated: NDArray[np.int64], estimated: NDArray[np.int64]) -> NDArray[np.int64]:
    """Output tokens to expect in all, given those generated so far: whenever the estimate is outlived, as many again.

    The estimate, doubled as often as it takes to exceed `generated`. estimated: at least 1 each.
    """
    multiples = np.maximum(generated // estimated, 1).astype(np.float64)
    # frexp gives the exponent above the number: 1, 2, 2, 3 for 1, 2, 3, 4, which is its bit length.
    doublings = np.where(generated >= estimated, np.frexp(multiples)[1], 0)
    return np.left_shift(estimated, doublings.astype(np.int64))


class Request:
    """One request, and how far it came before it last waited or while it is prefilled.

    `num_computed_tokens`: tokens (of prompt, then earlier output) whose K and V are in the cache; counted while it is
    prefilled up to `num_prefill_tokens`, its length when it was admitted. `output_token_ids` is up to date when it
    doesn't run; what changes with each step of a running request is in `RunningRequests`.
    """

    __slots__ = (
        "block_table",
        "estimated_output_tokens",
        "front",
        "max_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_preemptions",
        "num_prefill_tokens",
        "num_synced_blocks",
        "num_tree_blocks",
        "output_token_ids",
        "position",
        "prompt_token_ids",
        "request_id",
        "row_index",
        "seed",
    )

    def __init__(
        self,
        *,
        position: int,
        row_index: int,
        request_id: str,
        prompt_token_ids: NDArray[np.int32],
        max_tokens: int,
        estimated_output_tokens: int,
        seed: int = 0,
    ) -> None:
        self.position = position
        self.row_index = row_index
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.max_tokens = max_tokens
        self.estimated_output_tokens = estimated_output_tokens
        self.seed = seed
        self.front = Front.LEFT
        self.output_token_ids: list[int] = []
        self.num_computed_tokens = 0
        self.num_prefill_tokens = 0
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.block_table: list[int] = []
        self.num_tree_blocks = 0  # the first blocks of its table that the prefix tree knows
        self.num_synced_blocks = 0  # the first blocks of its table that the runner has been told of

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def remaining_output_tokens(self) -> int:
        """Tokens that it is expected to generate when it is admitted, at least one; see `expected_output_tokens`."""
        generated, expected = len(self.output_token_ids), max(self.estimated_output_tokens, 1)
        if generated >= expected:
            expected <<= (generated // expected).bit_length()
        return max(min(expected, self.max_tokens) - generated, 1)

    @property
    def footprint_tokens(self) -> float:
        """KV cache tokens that it alone would hold on average, from its admission to its end."""
        return self.num_tokens + self.remaining_output_tokens / 2

    @property
    def full_tokens(self) -> int:
        """KV cache tokens that it alone would hold at its end."""
        return self.num_tokens + self.remaining_output_tokens

    def token_slice(self, start: int, end: int) -> NDArray[np.int32]:
        """Token ids [start, end) of prompt and earlier output together."""
        num_prompt = len(self.prompt_token_ids)
        if end <= num_prompt:
            return self.prompt_token_ids[start:end]
        outputs = np.asarray(self.output_token_ids[max(start - num_prompt, 0) : end - num_prompt], dtype=np.int32)
        return np.concatenate((self.prompt_token_ids[start:], outputs)) if start < num_prompt else outputs
