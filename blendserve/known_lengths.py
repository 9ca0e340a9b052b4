"""The lengths of a shard's requests, where they are known before it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

_MUCH_SHARED: Final = 0.1  # of a prompt
_LEAST_SHARED: Final = 32  # tokens


@dataclass(frozen=True, slots=True)
class KnownLengths:
    """Of a shard's requests, by position [num_requests].

    prompt_tokens, output_tokens, shared_tokens: int64; the last is what a prompt has in common with the one before.
    """

    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    shared_tokens: NDArray[np.int64]

    @property
    def is_shared(self) -> NDArray[np.bool_]:
        """bool [num_requests]: whether much of a prompt is in common with a neighbour's: they are computed together."""
        with_previous = self.shared_tokens > np.maximum(_MUCH_SHARED * self.prompt_tokens, _LEAST_SHARED)
        found: NDArray[np.bool_] = with_previous | np.append(with_previous[1:], False)[: len(with_previous)]
        return found

    @property
    def computed_tokens(self) -> NDArray[np.int64]:
        """int64 [num_requests]: what steps compute of each request, if prefixes are shared; its last token never is."""
        return self.prompt_tokens - self.shared_tokens + np.maximum(self.output_tokens - 1, 0)
