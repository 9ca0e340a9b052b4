"""The ragged batch that one step feeds to a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PrefillPart:
    """Attention metadata of the prefill chunks. B chunks, T tokens in all."""

    block_table: torch.Tensor  # int32 [B, max_blocks]
    cu_seqlens_q: torch.Tensor  # int32 [B + 1]
    context_lens: torch.Tensor  # int32 [B], tokens in the cache including the chunk
    max_seqlen_q: int


@dataclass(frozen=True, slots=True)
class DecodePart:
    """Attention metadata of the decodes, one token each. B decodes."""

    block_table: torch.Tensor  # int32 [B, max_blocks]
    context_lens: torch.Tensor  # int32 [B], tokens in the cache including the one being decoded


@dataclass(frozen=True, slots=True)
class ModelBatch:
    """T tokens, flat: the decodes first, then the prefill chunks one after the other.

    `logits_indices` are the tokens whose next token is sampled; only their logits are computed.
    """

    token_ids: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T]
    slot_mapping: torch.Tensor  # int64 [T]
    num_decode_tokens: int
    decode: DecodePart | None
    prefill: PrefillPart | None
    logits_indices: torch.Tensor  # int64 [num_sampled]
