"""A scheduled batch as the arrays that go to the device: one for the model, in a fixed layout, and one for sampling."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from blendserve.engine.running import IntArray
from blendserve.engine.scheduled_batch import ScheduledBatch, TableChange
from blendserve.models.batch import DecodePart, ModelBatch, PrefillPart


@dataclass(frozen=True, slots=True)
class StepShape:
    """How many tokens, decodes and prefill chunks the model gets, padding included.

    num_programs: where decodes and chunks run side by side, how many SMs decode attention takes, and the chunks' tokens
    begin behind the padding of the decodes. 0: all go through the model together.
    """

    num_tokens: int
    num_decodes: int
    num_chunks: int
    num_programs: int = 0

    @property
    def sizes(self) -> list[int]:
        """The parts of the model's array: token_ids, positions, slots, then rows and contexts of decodes and chunks,
        and where the chunks begin."""
        chunks = [self.num_chunks, self.num_chunks, self.num_chunks + 1]
        return [self.num_tokens] * 3 + [self.num_decodes] * 2 + chunks

    @property
    def num_words(self) -> int:
        return sum(self.sizes)

    @property
    def has_few_outputs(self) -> bool:
        """Whether it pays to end the model's pass for the decodes and the chunks' last tokens alone."""
        return self.num_decodes + self.num_chunks < self.num_tokens

    def first_prefill_token(self, num_decodes: int) -> int:
        """Where the chunks' tokens begin when there are `num_decodes` decodes without padding."""
        return self.num_decodes if self.num_programs else num_decodes


class BlockTables:
    """The block tables of all rows, on the host and on the device, int32 [max_num_seqs + 1, max_blocks].

    The last row is for padding: nothing is ever stored or read through it.
    """

    def __init__(self, max_num_seqs: int, max_blocks: int, device: torch.device) -> None:
        self._host = np.zeros((max_num_seqs + 1, max_blocks), dtype=np.int32)
        self.device = torch.zeros((max_num_seqs + 1, max_blocks), dtype=torch.int32, device=device)

    def change(self, changes: list[TableChange]) -> tuple[IntArray, IntArray]:
        """Take changes in on the host. Returns (index into the flat table, block) for the device to do the same."""
        max_blocks = self._host.shape[1]
        starts = [change.row * max_blocks + change.first for change in changes]
        index = ranges(np.array(starts, dtype=np.int64), np.array([len(c.blocks) for c in changes], dtype=np.int64))
        blocks = np.array([block for change in changes for block in change.blocks], dtype=np.int64)
        self._host.ravel()[index] = blocks
        return index, blocks

    def slots(self, rows: IntArray, positions: IntArray, block_size: int) -> IntArray:
        """Where in the KV cache the tokens at these positions of these rows are stored."""
        block_index, offset = np.divmod(positions, block_size)
        result: IntArray = self._host[rows, block_index].astype(np.int64) * block_size + offset
        return result


def model_words(batch: ScheduledBatch, shape: StepShape, tables: BlockTables, block_size: int, out: IntArray) -> None:
    """Fill `out`, int64 [shape.num_words]. A decode's token is known to the device alone: -1 - row stands for it.

    A shape without decodes takes them as chunks of one token.
    """
    parts = np.split(out, np.cumsum(shape.sizes)[:-1])
    token_ids, positions, slots, decode_rows, decode_contexts, chunk_rows, chunk_contexts, chunk_starts = parts
    num_decodes = len(batch.decode_rows)
    rows = np.array([chunk.row for chunk in batch.prefills], dtype=np.int64)
    starts = np.array([chunk.start for chunk in batch.prefills], dtype=np.int64)
    lens = np.array([chunk.num_tokens for chunk in batch.prefills], dtype=np.int64)
    first = shape.first_prefill_token(num_decodes)
    decodes, chunks = slice(num_decodes), slice(first, first + batch.num_prefill_tokens)
    token_ids[:] = positions[:] = 0
    slots[:] = -1
    token_ids[decodes] = -1 - batch.decode_rows
    if batch.prefills:
        np.concatenate([chunk.token_ids for chunk in batch.prefills], out=token_ids[chunks])
    positions[decodes] = batch.decode_positions
    positions[chunks] = ranges(starts, lens)
    slots[decodes] = tables.slots(batch.decode_rows, batch.decode_positions, block_size)
    slots[chunks] = tables.slots(np.repeat(rows, lens), positions[chunks], block_size)
    padding_row = tables.device.shape[0] - 1
    contexts = starts + lens
    if shape.num_decodes:
        _fill(decode_rows, batch.decode_rows, padding_row)
        _fill(decode_contexts, batch.decode_positions + 1, 0)
        first = 0 if shape.num_programs else num_decodes
    else:
        rows = np.concatenate((batch.decode_rows, rows))
        contexts = np.concatenate((batch.decode_positions + 1, contexts))
        lens = np.concatenate((np.ones(num_decodes, dtype=np.int64), lens))
        first = 0
    _fill(chunk_rows, rows, padding_row)
    _fill(chunk_contexts, contexts, 0)
    _fill(chunk_starts, first + np.concatenate(([0], np.cumsum(lens))), first + int(lens.sum()))


def model_batches(
    words: torch.Tensor,
    shape: StepShape,
    tables: torch.Tensor,
    last_tokens: torch.Tensor,
    longest_chunk: int,
    num_sms: int = 0,
) -> list[ModelBatch]:
    """The batch from its words on the device, int64 [shape.num_words]; two where decodes and chunks run side by side.

    tables: as wide as the longest context needs. last_tokens: int64 [rows], the token that each row sampled last.
    longest_chunk: in tokens, an upper bound. num_sms: of the device, which decode attention and the chunks' products
    share where they run side by side.
    """
    token_ids, positions, slots, *parts = torch.split(words, shape.sizes)
    decode_rows, decode_contexts, chunk_rows, chunk_contexts, chunk_starts = parts
    sampled = last_tokens[(-1 - token_ids).clamp(min=0)]
    token_ids = torch.where(token_ids < 0, sampled, token_ids)
    decode = prefill = None
    if shape.num_decodes:
        decode = DecodePart(tables[decode_rows], decode_contexts.int(), shape.num_programs or None)
    outputs = None
    if shape.num_chunks:
        prefill = PrefillPart(tables[chunk_rows], chunk_starts.int(), chunk_contexts.int(), longest_chunk)
        outputs = (chunk_starts[1:] - 1).clamp(min=0) if shape.has_few_outputs else None
    if not shape.num_programs:
        if outputs is not None and shape.num_decodes:
            outputs = torch.cat((torch.arange(shape.num_decodes, device=words.device), outputs))
        return [ModelBatch(token_ids, positions, slots, decode, prefill, outputs)]
    first, second = slice(shape.num_decodes), slice(shape.num_decodes, None)
    num_others = num_sms - shape.num_programs
    return [
        ModelBatch(token_ids[first], positions[first], slots[first], decode, None),
        ModelBatch(token_ids[second], positions[second], slots[second], None, prefill, outputs, num_others),
    ]


def sampled_outputs(batch: ScheduledBatch, shape: StepShape) -> IntArray:
    """Which of the model's outputs are sampled from: the decodes', and the last of each chunk that ends its prompt."""
    num_decodes = len(batch.decode_rows)
    is_last = np.array([chunk.is_last for chunk in batch.prefills], dtype=np.bool_)
    if shape.has_few_outputs:
        chunks = (shape.num_decodes or num_decodes) + np.flatnonzero(is_last)
        return np.concatenate((np.arange(num_decodes, dtype=np.int64), chunks))
    chunk_ends = (
        shape.first_prefill_token(num_decodes)
        + np.cumsum([chunk.num_tokens for chunk in batch.prefills], dtype=np.int64)
        - 1
    )
    return np.concatenate((np.arange(num_decodes, dtype=np.int64), chunk_ends[is_last]))


def ranges(starts: IntArray, lens: IntArray) -> IntArray:
    """[start, start + len) of each pair, one after the other."""
    ends = np.cumsum(lens)
    within = np.arange(lens.sum(), dtype=np.int64)
    result: IntArray = within + np.repeat(starts - (ends - lens), lens)
    return result


def _fill(target: NDArray[np.int64], values: IntArray, padding: int) -> None:
    target[: len(values)] = values
    target[len(values) :] = padding
