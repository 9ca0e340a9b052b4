"""The ragged batch that one step feeds to a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PrefillPart:
    """Attention metadata of the prefill chunks. B chunks, padded with empty ones where the shape is fixed."""

    block_table: torch.Tensor  # int32 [B, max_blocks]
    cu_seqlens_q: torch.Tensor  # int32 [B + 1]: chunk b is tokens cu_seqlens_q[b] to cu_seqlens_q[b + 1] of the batch
    context_lens: torch.Tensor  # int32 [B], tokens in the cache including the chunk
    max_seqlen_q: int  # an upper bound


@dataclass(frozen=True, slots=True)
class DecodePart:
    """Attention metadata of the decodes, one token each: the first B tokens of the batch.

    A request of context 0 is padding; its token may belong to a prefill chunk.
    """

    block_table: torch.Tensor  # int32 [B, max_blocks]
    context_lens: torch.Tensor  # int32 [B], tokens in the cache including the one being decoded
    num_programs: int | None = None  # SMs that attention may take, all by default


@dataclass(frozen=True, slots=True)
class ModelBatch:
    """T tokens, flat: the decodes first, then the prefill chunks one after the other, then padding (slot -1)."""

    token_ids: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T]
    slot_mapping: torch.Tensor  # int64 [T]
    decode: DecodePart | None
    prefill: PrefillPart | None
    outputs: torch.Tensor | None = None  # int64 [num_outputs], tokens whose next token may be wanted; all T by default
    product_programs: int | None = None  # SMs that products may take, all by default
