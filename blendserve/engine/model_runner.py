"""Runs a scheduled batch on the device: builds its tensors, calls the model, samples. Owns the KV cache tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from blendserve.engine.request import Request
from blendserve.engine.sampler import Sampler
from blendserve.engine.scheduler import PrefillChunk, ScheduledBatch
from blendserve.models.batch import DecodePart, ModelBatch, PrefillPart
from blendserve.models.llama import LayerCache, LlamaModel


@dataclass(frozen=True, slots=True)
class StepOutput:
    """One new token for each of a batch's sampled requests. Not valid where the logits weren't finite."""

    token_ids: list[int]
    is_valid: list[bool]


class ModelRunner:
    """The model with its KV cache: `num_blocks` blocks of `block_size` tokens."""

    def __init__(
        self,
        model: LlamaModel,
        sampler: Sampler,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        config = model.config
        self._model = model
        self._sampler = sampler
        self._device = model.device
        self._block_size = block_size
        shape = (num_blocks, config.num_kv_heads, block_size, config.head_dim)
        self._kv_cache: list[LayerCache] = [(self._zeros(shape), self._zeros(shape)) for _ in range(config.num_layers)]
        max_blocks = min(-(-max_model_len // block_size), num_blocks)
        self._block_tables = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)  # [row, block]

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch) -> StepOutput:
        """Compute all tokens of the batch and sample one for each request that is due."""
        logits = self._model.forward(self._model_batch(batch), self._kv_cache)
        sampled = batch.sampled
        if not sampled:
            return StepOutput([], [])
        logits = logits.float()
        seeds = np.array([request.seed for request in sampled], dtype=np.int64)
        positions = np.array([len(request.output_token_ids) for request in sampled], dtype=np.int64)
        # A sum shows a NaN or an infinity anywhere in its row.
        is_valid = torch.isfinite(logits.sum(dim=-1))
        tokens = self._sampler(logits, seeds, positions)
        result = torch.stack((tokens, is_valid.long())).cpu()
        return StepOutput(result[0].tolist(), [bool(flag) for flag in result[1].tolist()])

    def _zeros(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.zeros(shape, dtype=self._model.dtype, device=self._device)

    def _model_batch(self, batch: ScheduledBatch) -> ModelBatch:
        for request in batch.decodes:
            self._sync_block_table(request)
        for chunk in batch.prefills:
            self._sync_block_table(chunk.request)
        decode_rows = np.array([request.row for request in batch.decodes], dtype=np.int64)
        decode_positions = np.array([request.num_computed_tokens for request in batch.decodes], dtype=np.int64)
        chunk_rows = np.array([chunk.request.row for chunk in batch.prefills], dtype=np.int64)
        chunk_starts = np.array([chunk.request.num_computed_tokens for chunk in batch.prefills], dtype=np.int64)
        chunk_lens = np.array([chunk.num_tokens for chunk in batch.prefills], dtype=np.int64)
        positions = np.concatenate((decode_positions, _ranges(chunk_starts, chunk_lens)))
        rows = np.concatenate((decode_rows, np.repeat(chunk_rows, chunk_lens)))
        block_index, offset = np.divmod(positions, self._block_size)
        slot_mapping = self._block_tables[rows, block_index].astype(np.int64) * self._block_size + offset
        return ModelBatch(
            token_ids=self._tensor(_token_ids(batch)),
            positions=self._tensor(positions),
            slot_mapping=self._tensor(slot_mapping),
            num_decode_tokens=len(batch.decodes),
            decode=self._decode_part(decode_rows, decode_positions),
            prefill=self._prefill_part(chunk_rows, chunk_starts, chunk_lens),
            logits_indices=self._tensor(_logits_indices(len(batch.decodes), batch.prefills, chunk_lens)),
        )

    def _decode_part(self, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> DecodePart | None:
        if len(rows) == 0:
            return None
        context_lens = positions + 1
        return DecodePart(
            block_table=self._tensor(self._tables_of(rows, context_lens)),
            context_lens=self._tensor(context_lens.astype(np.int32)),
        )

    def _prefill_part(
        self, rows: NDArray[np.int64], starts: NDArray[np.int64], lens: NDArray[np.int64]
    ) -> PrefillPart | None:
        if len(rows) == 0:
            return None
        context_lens = starts + lens
        return PrefillPart(
            block_table=self._tensor(self._tables_of(rows, context_lens)),
            cu_seqlens_q=self._tensor(np.concatenate(([0], np.cumsum(lens))).astype(np.int32)),
            context_lens=self._tensor(context_lens.astype(np.int32)),
            max_seqlen_q=int(lens.max()),
        )

    def _tables_of(self, rows: NDArray[np.int64], context_lens: NDArray[np.int64]) -> NDArray[np.int32]:
        """Block tables of these rows, as wide as the longest of them needs."""
        num_blocks = -(-int(context_lens.max()) // self._block_size)
        return self._block_tables[rows, :num_blocks]

    def _sync_block_table(self, request: Request) -> None:
        table, start = request.block_table, request.num_synced_blocks
        if start < len(table):
            self._block_tables[request.row, start : len(table)] = table[start:]
            request.num_synced_blocks = len(table)

    def _tensor(self, array: NDArray[np.int64] | NDArray[np.int32]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def _token_ids(batch: ScheduledBatch) -> NDArray[np.int64]:
    decoded = np.array([request.output_token_ids[-1] for request in batch.decodes], dtype=np.int64)
    chunks = [
        chunk.request.token_slice(
            chunk.request.num_computed_tokens, chunk.request.num_computed_tokens + chunk.num_tokens
        )
        for chunk in batch.prefills
    ]
    return np.concatenate((decoded, *chunks), dtype=np.int64)


def _ranges(starts: NDArray[np.int64], lens: NDArray[np.int64]) -> NDArray[np.int64]:
    """[start, start + len) of each pair, one after the other."""
    ends = np.cumsum(lens)
    within = np.arange(lens.sum(), dtype=np.int64)
    result: NDArray[np.int64] = within + np.repeat(starts - (ends - lens), lens)
    return result


def _logits_indices(num_decodes: int, prefills: list[PrefillChunk], chunk_lens: NDArray[np.int64]) -> NDArray[np.int64]:
    """The decodes' tokens, and the last token of each chunk that completes its prompt."""
    is_last = np.array([chunk.is_last for chunk in prefills], dtype=np.bool_)
    chunk_ends = num_decodes + np.cumsum(chunk_lens) - 1
    return np.concatenate((np.arange(num_decodes, dtype=np.int64), chunk_ends[is_last]))
