"""The prompts' token ids as one flat array on disk, for reading rows in any order without a Python object a row."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

_BATCH_ROWS = 1024
_FIRST_SLICE = 8  # most neighbours differ within a few tokens
_MAX_SLICE = 256
_MAX_COMPARED = 2**20  # tokens compared at one time
_MAX_PAIRS = 2**12  # prompts compared before their pages are given back: each pair maps about 200 KiB of the file


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """`token_ids[offsets[i] : offsets[i + 1]]` are the tokens of the prompt in row i of the Parquet file.

    token_ids: int32 [num_tokens + padding], a view of the file `mapped`; offsets: int64 [num_rows + 1].
    """

    mapped: mmap.mmap
    token_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    def take(self, rows: NDArray[np.int64]) -> pa.ListArray:
        """The prompts of `rows`, in that order."""
        lengths = self.lengths[rows]
        ends = np.cumsum(lengths)
        shift = np.repeat(self.offsets[rows] - (ends - lengths), lengths)
        values = self.token_ids[shift + np.arange(len(shift))]
        self._let_go()
        offsets = np.concatenate([np.zeros(1, np.int64), ends]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))

    def common_prefix_lengths(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int32]:
        """int32 [num_pairs]: how many leading tokens the prompts of rows `first[i]` and `second[i]` share."""
        limits = np.minimum(self.lengths[first], self.lengths[second])
        shared = np.zeros(len(first), np.int64)
        active = np.flatnonzero(limits > 0)
        width = _FIRST_SLICE
        while len(active):
            at = shared[active]
            equal = self._num_equal(self.offsets[first[active]] + at, self.offsets[second[active]] + at, width)
            shared[active] = np.minimum(at + equal, limits[active])
            active = active[(equal == width) & (shared[active] < limits[active])]
            width = min(width * 4, _MAX_SLICE)
        return shared.astype(np.int32)

    def _num_equal(self, first: NDArray[np.int64], second: NDArray[np.int64], width: int) -> NDArray[np.int64]:
        """int64 [num_pairs]: leading equal tokens among the `width` tokens at offsets `first` and `second`."""
        windows = np.lib.stride_tricks.sliding_window_view(self.token_ids, width)
        equal = np.empty(len(first), np.int64)
        step = min(_MAX_COMPARED // width, _MAX_PAIRS)
        for begin in range(0, len(first), step):
            part = slice(begin, begin + step)
            differs = windows[first[part]] != windows[second[part]]
            equal[part] = np.where(differs.any(axis=1), differs.argmax(axis=1), width)
            if begin // _MAX_PAIRS != (begin + step) // _MAX_PAIRS:
                self._let_go()
        return equal

    def _let_go(self) -> None:
        """Give back the pages that were read; otherwise the whole file would come to count as this process's memory."""
        self.mapped.madvise(mmap.MADV_DONTNEED)


@contextmanager
def open_prompt_tokens(path: Path, folder: Path) -> Iterator[PromptTokens]:
    """The column `prompt_token_ids` of the Parquet file `path`, kept in an unnamed temporary file in `folder`."""
    lengths: list[NDArray[np.int64]] = []
    with TemporaryFile(dir=folder) as file, pq.ParquetFile(path) as parquet:
        for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, columns=["prompt_token_ids"], use_threads=False):
            prompts = batch.column(0)
            lengths.append(np.diff(prompts.offsets.to_numpy(zero_copy_only=False)).astype(np.int64))
            prompts.flatten().to_numpy(zero_copy_only=False).astype(np.int32, copy=False).tofile(file)
        np.zeros(_MAX_SLICE, np.int32).tofile(file)  # so that a slice may reach beyond the last prompt
        file.flush()
        offsets = np.concatenate([np.zeros(1, np.int64), *lengths]).cumsum()
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        mapped.madvise(mmap.MADV_RANDOM)  # reading ahead would fetch 30 times what is used where memory is short
        yield PromptTokens(mapped, np.frombuffer(mapped, dtype=np.int32), offsets)
