"""Runs scheduled batches on the device: uploads their arrays, calls the model, samples. Owns the KV cache tensors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from blendserve.engine.cuda_graphs import (
    CapturedPasses,
    is_captured,
    overlapped_shape,
    padded_samples,
    padded_shape,
    shapes_to_prepare,
)
from blendserve.engine.overlap import OverlapPolicy
from blendserve.engine.running import IntArray
from blendserve.engine.sampler import Sampler
from blendserve.engine.scheduled_batch import ScheduledBatch
from blendserve.engine.step_inputs import BlockTables, StepShape, model_batches, model_words, sampled_outputs
from blendserve.models.batch import ModelBatch
from blendserve.models.llama import LayerCache, LlamaModel
from blendserve_kernels.copy_blocks import copy_blocks

# Steps whose host buffers may be in use at one time: the one that is filled, the one that runs, one to spare.
_NUM_BUFFERS = 3


@dataclass(frozen=True, slots=True)
class StepOutput:
    """One new token for each of a batch's sampled rows. Not valid where the logits weren't finite."""

    token_ids: NDArray[np.int32]
    is_valid: NDArray[np.bool_]
    busy_seconds: float  # that a GPU was at it; 0 on a CPU


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step on its way. `result`: int64 [2, num_sampled] on the host, tokens and validity, once `ended` has passed."""

    result: torch.Tensor
    began: torch.cuda.Event | None
    ended: torch.cuda.Event | None


class ModelRunner:
    """The model with its KV cache: `num_blocks` blocks of `block_size` tokens. Steps run in the order of their launch.

    The token that a row samples stays on the device for its next step.
    """

    def __init__(
        self,
        model: LlamaModel,
        sampler: Sampler,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        is_batch_invariant: bool = False,
        overlap: OverlapPolicy | None = None,
    ) -> None:
        """is_batch_invariant: decodes go through prefill attention, whose tiles are the same for any batch.

        overlap: when decodes and prefill chunks run side by side; never without it.
        """
        self.model = model
        self._sampler = sampler
        self._device = model.device
        self._is_gpu = model.device.type == "cuda"
        self._block_size = block_size
        self._is_batch_invariant = is_batch_invariant
        self.overlap = overlap
        self._side_stream: torch.cuda.Stream | None = None
        self._num_sms = 0
        if self._is_gpu:
            self._num_sms = torch.cuda.get_device_properties(self._device).multi_processor_count
            self._side_stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._allocate(num_blocks)
        max_blocks = min(-(-max_model_len // block_size), num_blocks)
        self._tables = BlockTables(max_num_seqs, max_blocks, self._device)
        self._last_tokens = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=self._device)
        # The most tokens, decodes or chunks that a step has, with padding.
        most = max(max_num_batched_tokens, max_num_seqs) + max_num_seqs + 256
        num_words = StepShape(most, most, most).num_words
        self._words = [self._host_words(num_words) for _ in range(_NUM_BUFFERS)]
        self._device_words = torch.zeros(num_words, dtype=torch.int64, device=self._device)
        self._results = [self._host_words(2 * max_num_seqs) for _ in range(_NUM_BUFFERS)]
        self._num_launched = 0

    def resize_cache(self, num_blocks: int) -> None:
        """Another KV cache, with nothing in it, in place of the old one."""
        del self._blocks, self._kv_cache, self._captured
        if self._is_gpu:
            torch.cuda.empty_cache()
        self._allocate(num_blocks)

    def _allocate(self, num_blocks: int) -> None:
        config = self.model.config
        shape = (config.num_layers, 2, num_blocks, config.num_kv_heads, self._block_size, config.head_dim)
        self._blocks = torch.zeros(shape, dtype=self.model.dtype, device=self._device)
        self._kv_cache: list[LayerCache] = [(layer[0], layer[1]) for layer in self._blocks]
        self._captured = CapturedPasses(self._device) if self._is_gpu else None  # they hold on to the cache

    @torch.inference_mode()
    def launch(self, batch: ScheduledBatch) -> LaunchedStep:
        """Start a step: compute all tokens of the batch and sample one for each row that is due.

        At most one step may be on its way when it is called.
        """
        if batch.num_tokens == 0:
            return LaunchedStep(torch.zeros(2, 0, dtype=torch.int64), None, None)
        began = self._mark()
        buffer = self._num_launched % _NUM_BUFFERS
        self._num_launched += 1
        index, blocks = self._tables.change(batch.table_changes)
        copies = np.array([(copy.source, copy.target, copy.num_tokens) for copy in batch.block_copies], dtype=np.int64)
        num_sampled = len(batch.sampled_rows)
        shape = self._shape(batch)
        columns = [*self._sampling_columns(batch, shape), index, blocks, *copies.reshape(-1, 3).T]
        parts = torch.split(self._upload(np.concatenate(columns)), [len(column) for column in columns])
        sampled, rows, seeds, positions, index_there, blocks_there, *copies_there = parts
        if len(index):
            self._tables.device.view(-1)[index_there] = blocks_there.int()
        if len(copies):
            copy_blocks(self._blocks.flatten(0, 1), *copies_there)
        hidden = self._hidden(batch, shape, self._words[buffer])[sampled]
        if num_sampled == 0:
            return LaunchedStep(torch.zeros(2, 0, dtype=torch.int64), began, self._mark())
        token_ids, is_finite = self._sampler(self.model.logits(hidden), seeds, positions)
        self._last_tokens[rows] = token_ids
        result = self._results[buffer][: 2 * num_sampled].view(2, -1)
        result.copy_(torch.stack((token_ids, is_finite.long()))[:, :num_sampled], non_blocking=True)
        return LaunchedStep(result, began, self._mark())

    @torch.inference_mode()
    def warm_up(self) -> int:
        """Compile and capture for every shape of step, instead of when it first comes. Returns how many shapes."""
        if not self._is_gpu:
            return 0
        shapes = shapes_to_prepare(self._max_num_seqs, self._max_num_batched_tokens, self._is_batch_invariant)
        tables = self._tables.device
        for shape in shapes:
            words = self._words[0][: shape.num_words]
            model_words(ScheduledBatch(), shape, self._tables, self._block_size, words.numpy())
            words = self._device_words[: shape.num_words].copy_(words)
            if self._captured and is_captured(shape):
                for _ in range(2):
                    self._captured.run(shape, partial(self._forward, words, shape, tables, shape.num_tokens))
                continue
            for longest_chunk in (1, shape.num_tokens):
                self._forward(words, shape, tables, longest_chunk)
        for num_sampled in sorted({padded_samples(number) for number in range(1, self._max_num_seqs + 1)}):
            sampled = torch.zeros(num_sampled, dtype=torch.int64, device=self._device)
            hidden = self._kv_cache[0][0].new_zeros(num_sampled, self.model.config.hidden_size)
            self._sampler(self.model.logits(hidden), sampled, sampled)
        block = torch.zeros(1, dtype=torch.int64, device=self._device)
        copy_blocks(self._blocks.flatten(0, 1), block, block, block)
        torch.cuda.synchronize(self._device)
        return len(shapes)

    def collect(self, step: LaunchedStep) -> StepOutput:
        """Wait for a step's tokens."""
        busy_seconds = 0.0
        if step.began is not None and step.ended is not None:
            step.ended.synchronize()
            busy_seconds = step.began.elapsed_time(step.ended) / 1000
        token_ids, is_valid = step.result.numpy()
        return StepOutput(token_ids.astype(np.int32), is_valid.astype(np.bool_), busy_seconds)

    def _sampling_columns(self, batch: ScheduledBatch, shape: StepShape) -> list[IntArray]:
        """Outputs to sample from, their rows, seeds and positions; on a GPU padded, with the row for padding."""
        columns = [sampled_outputs(batch, shape), batch.sampled_rows, batch.sampled_seeds, batch.sampled_positions]
        num_sampled = len(batch.sampled_rows)
        if not self._is_gpu or num_sampled == 0:
            return columns
        padding = padded_samples(num_sampled) - num_sampled
        return [
            np.pad(column, (0, padding), constant_values=value)
            for column, value in zip(columns, (0, self._max_num_seqs, 0, 0), strict=True)
        ]

    def _hidden(self, batch: ScheduledBatch, shape: StepShape, host_words: torch.Tensor) -> torch.Tensor:
        """What the head needs of all outputs, [num_outputs, H]."""
        words = host_words[: shape.num_words]
        model_words(batch, shape, self._tables, self._block_size, words.numpy())
        words = self._device_words[: shape.num_words].copy_(words, non_blocking=True)
        tables = self._tables.device
        if self._captured and is_captured(shape):
            return self._captured.run(shape, partial(self._forward, words, shape, tables, shape.num_tokens))
        if not self._is_gpu:  # narrower tables are less to look at there; a GPU's kernels don't care
            contexts = [chunk.start + chunk.num_tokens for chunk in batch.prefills]
            longest = max([int(batch.decode_positions.max(initial=-1)) + 1, *contexts])
            tables = tables[:, : -(-longest // self._block_size)]
        longest_chunk = max((chunk.num_tokens for chunk in batch.prefills), default=0)
        return self._forward(words, shape, tables, longest_chunk)

    def _shape(self, batch: ScheduledBatch) -> StepShape:
        num_decodes, num_chunks = len(batch.decode_rows), len(batch.prefills)
        if self._is_batch_invariant:
            return padded_shape(0, batch.num_tokens, num_decodes + num_chunks)
        if self.overlap is not None:
            num_kv_tokens = int(batch.decode_positions.sum()) + num_decodes
            num_programs = self.overlap.num_programs(num_decodes, num_kv_tokens, batch.num_prefill_tokens)
            if num_programs:
                return overlapped_shape(num_decodes, batch.num_prefill_tokens, num_chunks, num_programs)
        if self._is_gpu:
            return padded_shape(num_decodes, batch.num_prefill_tokens, num_chunks)
        return StepShape(batch.num_tokens, num_decodes, num_chunks)

    def _forward(self, words: torch.Tensor, shape: StepShape, tables: torch.Tensor, longest_chunk: int) -> torch.Tensor:
        if self._is_batch_invariant:  # attention chooses its tiles by it
            longest_chunk = self._max_num_batched_tokens
        batches = model_batches(words, shape, tables, self._last_tokens, longest_chunk, self._num_sms)
        if len(batches) == 1:
            return self.model.forward(batches[0], self._kv_cache)
        return torch.cat(self._forward_side_by_side(*batches))

    def _forward_side_by_side(self, decodes: ModelBatch, chunks: ModelBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Both at one time: they don't depend on each other, and what one leaves idle the other can use."""
        if self._side_stream is None:
            return self.model.forward(decodes, self._kv_cache), self.model.forward(chunks, self._kv_cache)
        stream = torch.cuda.current_stream(self._device)
        self._side_stream.wait_stream(stream)
        with torch.cuda.stream(self._side_stream):
            chunks_hidden = self.model.forward(chunks, self._kv_cache)
        decodes_hidden = self.model.forward(decodes, self._kv_cache)
        stream.wait_stream(self._side_stream)
        return decodes_hidden, chunks_hidden

    def _upload(self, array: NDArray[np.int64]) -> torch.Tensor:
        host = torch.from_numpy(array)
        return host.pin_memory().to(self._device, non_blocking=True) if self._is_gpu else host

    def _host_words(self, num_words: int) -> torch.Tensor:
        return torch.zeros(num_words, dtype=torch.int64, pin_memory=self._is_gpu)

    def _mark(self) -> torch.cuda.Event | None:
        if not self._is_gpu:
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
