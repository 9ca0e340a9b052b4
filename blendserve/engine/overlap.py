"""When decodes and prefill chunks of a step run side by side, and how many SMs decode attention gets then.

Decode attention streams the KV cache and needs a third of the SMs for nine tenths of the bandwidth; products of prefill
chunks fill the rest. Both sides slow each other down, and the weights are read twice, so it only pays when there is
enough of both.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OverlapPolicy:
    """Limits below which a step runs in one piece."""

    decode_programs: int = 44
    min_kv_tokens: int = 100_000
    min_prefill_tokens: int = 256
    max_prefill_tokens: int = 2048

    def num_programs(self, num_decodes: int, num_kv_tokens: int, num_prefill_tokens: int) -> int:
        """SMs for decode attention, or 0 where the step runs in one piece."""
        has_enough = num_kv_tokens >= self.min_kv_tokens and num_prefill_tokens >= self.min_prefill_tokens
        return (
            self.decode_programs if num_decodes and has_enough and num_prefill_tokens <= self.max_prefill_tokens else 0
        )
