"""The made-up steps that the profiler measures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepMix:
    """What a measured step consists of: decodes at one context, and prompts of one length prefilled whole."""

    num_decodes: int = 0
    context_tokens: int = 0
    num_chunks: int = 0
    chunk_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        return self.num_decodes + self.num_chunks * self.chunk_tokens

    def features(self, kv_bytes_per_token: int) -> list[float]:
        """One, tokens, sampled tokens, attended pairs, whether anything decodes, KV cache bytes read."""
        pairs = self.num_chunks * self.chunk_tokens * (self.chunk_tokens + 1) / 2
        kv_bytes = self.num_decodes * self.context_tokens * kv_bytes_per_token
        sampled = self.num_decodes + self.num_chunks
        return [1.0, self.num_tokens, sampled, pairs, float(self.num_decodes > 0), kv_bytes]


SIDE_BY_SIDE_MIXES = tuple(
    StepMix(num_decodes, 768, num_chunks, 512) for num_decodes in (256, 512) for num_chunks in (2, 3, 4)
)


PREFILL_MIXES = tuple(
    StepMix(num_chunks=tokens // chunk, chunk_tokens=chunk)
    for tokens in (128, 256, 512, 1024, 2048, 4096, 8192)
    for chunk in (128, 512, 2048, 8192)
    if chunk <= tokens
)
DECODE_MIXES = tuple(
    StepMix(num_decodes=number, context_tokens=context)
    for number in (1, 8, 32, 64, 128, 256, 512, 1024)
    for context in (64, 256, 1024, 4096)
)


@dataclass(frozen=True, slots=True)
class MixLimits:
    """What a measured step may have."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    capacity_tokens: int

    def fit(self, mixes: Iterable[StepMix]) -> list[StepMix]:
        return [mix for mix in mixes if self._fits(mix)]

    def _fits(self, mix: StepMix) -> bool:
        return (
            mix.num_decodes + mix.num_chunks <= self.max_num_seqs
            and mix.num_tokens <= self.max_num_batched_tokens
            and max(mix.context_tokens, mix.chunk_tokens) <= self.max_model_len
            and mix.num_decodes * (mix.context_tokens + 256) + mix.num_chunks * mix.chunk_tokens <= self.capacity_tokens
        )
