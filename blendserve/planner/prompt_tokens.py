"""The prompts' token ids as one flat file, for reading rows in any order without a Python object a token."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

MAX_WIDTH: Final = 256  # tokens of a prompt that are compared at one time

_FILE: Final = ".prompt_tokens.bin"  # hidden: it is nothing to publish
_BATCH_ROWS: Final = 1024
_BUFFER_BYTES: Final = 2**20
_MAX_COMPARED: Final = 2**20  # tokens compared at one time
_MAX_MAPPED_ROWS: Final = 2**13  # rows read before their pages are given back: each maps up to 64 KiB of the file
_DIGEST_BYTES: Final = hashlib.sha256().digest_size


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """`token_ids[offsets[i] : offsets[i + 1]]` are the tokens of the prompt in row i of the Parquet file.

    token_ids: int32 [num_tokens + at least MAX_WIDTH], a view of `mapped`, which is `file`; offsets: int64
    [num_rows + 1].
    """

    file: BinaryIO
    mapped: mmap.mmap
    token_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    def take(self, rows: NDArray[np.int64]) -> pa.ListArray:
        """The prompts of `rows`, in that order."""
        ends = np.append(0, np.cumsum(self.offsets[rows + 1] - self.offsets[rows]))
        values = np.empty(ends[-1], np.int32)
        room, places = values.view(np.uint8).data, (ends * values.itemsize).tolist()
        begins = (self.offsets[rows] * values.itemsize).tolist()
        # Mapping pages here and there, to read one row of each, would take three times as long.
        for begin, first, last in zip(begins, places, places[1:], strict=False):
            os.preadv(self.file.fileno(), [room[first:last]], begin)
        return pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), pa.array(values))

    def num_equal(
        self, first: NDArray[np.int64], second: NDArray[np.int64], start: NDArray[np.int64], width: int
    ) -> NDArray[np.int64]:
        """int64 [num_pairs]: how many of the `width` tokens after `start[i]` the rows `first[i]`, `second[i]` share."""
        windows = np.lib.stride_tricks.sliding_window_view(self.token_ids, width)
        begin, other = self.offsets[first] + start, self.offsets[second] + start
        equal = np.minimum(self.offsets[first + 1] - begin, self.offsets[second + 1] - other)
        for part in self._in_file_order(begin, _MAX_COMPARED // width):
            differs = windows[begin[part]] != windows[other[part]]
            equal[part] = np.minimum(equal[part], np.where(differs.any(axis=1), differs.argmax(axis=1), width))
        return equal

    def windows(self, rows: NDArray[np.int64], start: NDArray[np.int64], width: int) -> NDArray[np.int32]:
        """int32 [num_rows, width]: the tokens of each row after `start[i]`; the least number beyond a prompt's end."""
        windows = np.lib.stride_tricks.sliding_window_view(self.token_ids, width)
        begin = self.offsets[rows] + start
        found = np.empty((len(rows), width), np.int32)
        for part in self._in_file_order(begin, _MAX_MAPPED_ROWS):
            found[part] = windows[begin[part]]
        is_beyond = np.arange(width) >= (self.offsets[rows + 1] - begin)[:, None]
        return np.where(is_beyond, np.iinfo(np.int32).min, found)

    def _in_file_order(self, begin: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
        """Places in `begin`, up to `size` at one time, so that the file is read from its begin to its end.

        The pages that were read are given back; otherwise the whole file would come to count as this process's memory.
        """
        order = np.argsort(begin, kind="stable")
        for place in range(0, len(order), size):
            yield order[place : place + size]
            if place // _MAX_MAPPED_ROWS != (place + size) // _MAX_MAPPED_ROWS:
                self.mapped.madvise(mmap.MADV_DONTNEED)


@contextmanager
def open_prompt_tokens(path: Path, folder: Path) -> Iterator[PromptTokens]:
    """The column `prompt_token_ids` of the Parquet file `path`, from a file in `folder` that is made where it must be.

    It stays there for the step that comes next, until `remove_prompt_tokens`.
    """
    kept = folder / _FILE
    if not _is_of(kept, path):
        remove_prompt_tokens(folder)
        try:
            _write(path, kept)
        except BaseException:
            remove_prompt_tokens(folder)
            raise
    with kept.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        num_rows = int(np.frombuffer(mapped, np.int64, 1, len(mapped) - _DIGEST_BYTES - 8)[0])
        offsets = np.frombuffer(mapped, np.int64, num_rows + 1, len(mapped) - _DIGEST_BYTES - 8 * (num_rows + 2))
        yield PromptTokens(file, mapped, np.frombuffer(mapped, np.int32), offsets.copy())


def remove_prompt_tokens(folder: Path) -> None:
    """Remove what `open_prompt_tokens` keeps in `folder`."""
    (folder / _FILE).unlink(missing_ok=True)


def _is_of(kept: Path, path: Path) -> bool:
    """Whether `kept` is whole and was made of the file that `path` is now."""
    if not kept.is_file() or kept.stat().st_size < _DIGEST_BYTES:
        return False
    with kept.open("rb") as file:
        file.seek(-_DIGEST_BYTES, os.SEEK_END)
        return file.read() == _digest(path, file.tell())


def _digest(path: Path, num_bytes: int) -> bytes:
    """What a whole file of `num_bytes` made of `path` ends with.

    A machine that went down may have lost pages of it, as it is never synced: its start counts as well.
    """
    source = path.stat()
    identity = (source.st_ino, source.st_size, source.st_mtime_ns, int(psutil.boot_time()), num_bytes)
    return hashlib.sha256(repr(identity).encode()).digest()


def _write(path: Path, kept: Path) -> None:
    """Tokens, zeros so that a window may reach beyond the last prompt, offsets, number of rows, digest."""
    lengths = [np.zeros(1, np.int64)]
    with pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as parquet, kept.open("xb") as file:
        for prompts in _read_ahead(parquet):
            lengths.append(np.diff(prompts.offsets.to_numpy(zero_copy_only=False)).astype(np.int64))
            file.write(prompts.flatten().to_numpy(zero_copy_only=False).astype(np.int32, copy=False).data)
        offsets = np.concatenate(lengths).cumsum()
        file.write(bytes(4 * (MAX_WIDTH + int(offsets[-1]) % 2)))  # the offsets begin at a multiple of 8
        file.write(np.append(offsets, len(offsets) - 1).data)
        file.write(_digest(path, file.tell() + _DIGEST_BYTES))


def _read_ahead(parquet: pq.ParquetFile) -> Iterator[pa.ListArray]:
    """The prompts of each batch; the next one is decoded while the caller works on this one."""
    batches = parquet.iter_batches(batch_size=_BATCH_ROWS, columns=["prompt_token_ids"], use_threads=False)
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(next, batches, None)
        while (batch := ahead.result()) is not None:
            ahead = reader.submit(next, batches, None)
            yield batch.column(0)
