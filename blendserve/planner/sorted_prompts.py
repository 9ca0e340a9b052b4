"""Sorting prompts by their tokens and finding what neighbours share: DuckDB sorts, NumPy compares."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from blendserve.planner.database import compute, open_database
from blendserve.planner.prompt_tokens import open_prompt_tokens


@dataclass(frozen=True, slots=True)
class SortedPrompts:
    """The rows of a Parquet file in lexical order of their prompts, equal ones by place; arrays [num_rows]."""

    file_position: NDArray[np.int64]
    num_prompt_tokens: NDArray[np.int64]
    shared_prefix_tokens: NDArray[np.int32]


def sort_prompts(path: Path, folder: Path) -> SortedPrompts:
    """Sort the column `prompt_token_ids` of the Parquet file `path`; temporary files go to `folder`.

    DuckDB is closed before the tokens are compared, so that the memory of both isn't held at one time.
    """
    with open_database(folder) as database:
        order = compute(database, "sorted_prompts", parameters={"prompts": str(path)})
    positions = np.asarray(order.column("file_position").to_numpy(), dtype=np.int64)
    shared = np.zeros(len(positions), np.int32)
    with open_prompt_tokens(path, folder) as prompts:
        shared[1:] = prompts.common_prefix_lengths(positions[:-1], positions[1:])
        lengths = prompts.lengths[positions]
    is_same = (shared[1:] == lengths[1:]) & (shared[1:] == lengths[:-1])
    prompt = np.concatenate([np.zeros(1, np.int64), np.cumsum(~is_same)])[: len(positions)]
    return SortedPrompts(positions[np.lexsort((positions, prompt))], lengths, shared)
