"""Which KV cache blocks are free, and how many requests use each of the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from blendserve.engine.invariants import require


class BlockAllocator:
    """Hands out block numbers 0 .. num_blocks - 1 and counts who uses each."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._num_references = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self) -> int:
        """A free block, referenced once. There must be one."""
        block = self._free.pop()
        self._num_references[block] = 1
        return block

    def acquire(self, block: int) -> int:
        """Reference a block once more. Returns its references."""
        self._num_references[block] += 1
        return self._num_references[block]

    def release(self, block: int) -> int:
        """Drop one reference. Returns those that are left; at 0 the caller frees the block or keeps it cached."""
        require(self._num_references[block] > 0, f"block {block} is in use")
        self._num_references[block] -= 1
        return self._num_references[block]

    def free(self, block: int) -> None:
        """Give a block without references back."""
        require(self._num_references[block] == 0, f"block {block} is out of use")
        self._free.append(block)

    def check_integrity(self, tables: Iterable[Sequence[int]], cached: set[int]) -> None:
        """Raise InvariantError unless each block is free, or cached, or referenced as often as `tables` name it."""
        expected = Counter(block for table in tables for block in table)
        free = set(self._free)
        require(len(free) == len(self._free), "each block is free at most once")
        for block, num_references in enumerate(self._num_references):
            require(num_references == expected[block], f"block {block} has {expected[block]} references")
            is_unused = num_references == 0 and block not in cached
            require((block in free) == is_unused, f"block {block} is free exactly when unused")
