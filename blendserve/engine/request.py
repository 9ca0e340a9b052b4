"""A request on its way through the engine, and the completion that it ends as."""

from __future__ import annotations

from dataclasses import dataclass
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
    """What a request ended as. `token_ids` holds every generated token, a final end-of-text token included."""

    row_index: int
    request_id: str
    text: str | None
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    error: str | None
    num_prompt_tokens: int
    num_cached_tokens: int


class Request:
    """One request and how far it has come.

    `num_computed_tokens`: tokens (of prompt, then output) whose K and V are in the cache. A request is prefilled up to
    `num_prefill_tokens`, its length when it was admitted: after a preemption that includes the tokens generated before.
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
        "num_shared_tokens",
        "num_synced_blocks",
        "num_tree_blocks",
        "output_token_ids",
        "position",
        "prompt_token_ids",
        "request_id",
        "row",
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
        self.num_shared_tokens = 0  # of the cached ones, those found when it was last admitted
        self.block_table: list[int] = []
        self.num_tree_blocks = 0  # the first blocks of its table that the prefix tree knows
        self.num_synced_blocks = 0  # the first blocks of its table that the runner has copied
        self.row: int | None = None  # its row in the runner's table while it runs

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def is_prefilling(self) -> bool:
        return self.num_computed_tokens < self.num_prefill_tokens

    @property
    def remaining_output_tokens(self) -> int:
        """Tokens it is still expected to generate, at least one. Whenever it outlives its estimate, as many again."""
        generated, estimate = len(self.output_token_ids), max(self.estimated_output_tokens, 1)
        expected = estimate << (generated // estimate).bit_length()
        return max(min(expected, self.max_tokens) - generated, 1)

    @property
    def footprint_tokens(self) -> float:
        """KV cache tokens that it alone holds, averaged over its life: p - shared + d / 2."""
        output_tokens = len(self.output_token_ids) + self.remaining_output_tokens
        return len(self.prompt_token_ids) - self.num_shared_tokens + output_tokens / 2

    @property
    def current_front(self) -> Front:
        """A request that outlives its estimate turns out to be memory-heavy: it counts for the right from then on."""
        return Front.RIGHT if len(self.output_token_ids) > self.estimated_output_tokens else self.front

    def token_slice(self, start: int, end: int) -> NDArray[np.int32]:
        """Token ids [start, end) of prompt and output together."""
        num_prompt = len(self.prompt_token_ids)
        if end <= num_prompt:
            return self.prompt_token_ids[start:end]
        outputs = np.asarray(self.output_token_ids[max(start - num_prompt, 0) : end - num_prompt], dtype=np.int32)
        return np.concatenate((self.prompt_token_ids[start:], outputs)) if start < num_prompt else outputs
