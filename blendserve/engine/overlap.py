"""When decodes and prefill chunks of a step run side by side, and how many SMs decode attention gets then.

Decode attention streams the KV cache and needs a third of the SMs for most of the bandwidth; products of prefill chunks
take the others. Both sides slow each other down, and the weights are read twice, so it only pays for many prefill
tokens beside a full KV cache: on an H100 with 512 decodes of 880 tokens a step takes 7 % less with 1,536 prefill tokens
and 36 SMs for attention, and 3 % more with 512 (`benchmarks/results/overlap-h100.json`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OverlapPolicy:
    """The limits outside of which a step runs in one piece."""

    decode_programs: int = 36
    min_kv_tokens: int = 200_000
    min_prefill_tokens: int = 1536
    max_prefill_tokens: int = 2560

    def num_programs(self, num_decodes: int, num_kv_tokens: int, num_prefill_tokens: int) -> int:
        """SMs for decode attention, or 0 where the step runs in one piece."""
        has_enough = num_kv_tokens >= self.min_kv_tokens and num_prefill_tokens >= self.min_prefill_tokens
        return (
            self.decode_programs if num_decodes and has_enough and num_prefill_tokens <= self.max_prefill_tokens else 0
        )
