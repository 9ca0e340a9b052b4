"""Sorting prompts by their tokens and finding what neighbours share, both in one pass over the shared prefixes.

Prompts that are equal so far are a group. What all of a group share is skipped; the few tokens after it split the group
into those that go their own way and smaller groups. DuckDB sorts by these few, NumPy compares. Memory is a few numbers
a prompt, the tokens stay in their file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from blendserve.planner.database import compute, open_database
from blendserve.planner.prompt_tokens import MAX_WIDTH, PromptTokens, open_prompt_tokens

_KEY_TOKENS: Final = 4  # that a group is sorted by at one time, as split_groups.sql has them
_FIRST_WIDTH: Final = 8  # most groups share no more


@dataclass(frozen=True, slots=True)
class SortedPrompts:
    """The rows of a Parquet file in lexical order of their prompts, equal ones by place; arrays [num_rows]."""

    file_position: NDArray[np.int64]
    num_prompt_tokens: NDArray[np.int64]
    shared_prefix_tokens: NDArray[np.int32]


def sort_prompts(path: Path, folder: Path) -> SortedPrompts:
    """Sort the column `prompt_token_ids` of the Parquet file `path`; its flat copy stays in `folder`."""
    with open_prompt_tokens(path, folder) as prompts, open_database(folder) as database:
        lengths = prompts.lengths
        order = np.arange(len(lengths))
        shared = np.zeros(len(lengths), np.int64)
        places, group, depth = order.copy(), np.zeros_like(order), np.zeros_like(order)
        while len(places):
            places, group, depth = _split_groups(database, prompts, order, shared, places, group, depth)
    return SortedPrompts(order, lengths[order], shared.astype(np.int32))


def _split_groups(
    database: duckdb.DuckDBPyConnection,
    prompts: PromptTokens,
    order: NDArray[np.int64],
    shared: NDArray[np.int64],
    places: NDArray[np.int64],
    group: NDArray[np.int64],
    depth: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Sort every group once; `order` and `shared` [num_rows] become right for what that settles.

    places: those in `order` that aren't settled, ascending; group: a number for each, ascending; depth: how many tokens
    its group is known to share. Returns the same of what isn't settled after this.
    """
    rows = order[places]
    depth = depth + _shared_by_group(prompts, rows, group, depth)
    left = prompts.lengths[rows] - depth
    keys = prompts.windows(rows, depth, _KEY_TOKENS)
    by = _sorted_within_groups(database, group, keys, left)
    order[places], left, keys = rows[by], left[by], keys[by]
    differs = keys[1:] != keys[:-1]
    limit = np.minimum(left[1:], left[:-1])
    equal = np.minimum(limit, np.where(differs.any(axis=1), differs.argmax(axis=1), _KEY_TOKENS))
    is_together = group[1:] == group[:-1]
    shared[places[1:][is_together]] = (depth[1:] + equal)[is_together]
    goes_on = is_together & (equal == _KEY_TOKENS) & (limit > _KEY_TOKENS)
    begins = np.append(True, ~goes_on)
    stays = ~begins | np.append(goes_on, False)
    return places[stays], np.cumsum(begins)[stays], (depth + _KEY_TOKENS)[stays]


def _sorted_within_groups(
    database: duckdb.DuckDBPyConnection, group: NDArray[np.int64], keys: NDArray[np.int32], left: NDArray[np.int64]
) -> NDArray[np.int64]:
    """int64 [num_rows]: the rows in lexical order of `keys` [num_rows, _KEY_TOKENS], group by group."""
    tokens = {f"token_{number}": keys[:, number] for number in range(_KEY_TOKENS)}
    columns = {"place": np.arange(len(group)), "group_number": group, **tokens, "num_tokens_left": left}
    found = compute(database, "split_groups", tables={"unsettled": pa.table(columns)})
    return np.asarray(found.column("place").to_numpy(), np.int64)


def _shared_by_group(
    prompts: PromptTokens, rows: NDArray[np.int64], group: NDArray[np.int64], depth: NDArray[np.int64]
) -> NDArray[np.int64]:
    """int64 [num_rows]: how many tokens after `depth` all prompts of a row's group share."""
    begins, sizes = _runs(group)
    first = np.repeat(rows[begins], sizes)
    shared = np.zeros(len(rows), np.int64)
    active, width = np.arange(len(rows)), _FIRST_WIDTH
    while len(active):
        equal = prompts.num_equal(rows[active], first[active], (depth + shared)[active], width)
        begins, sizes = _runs(group[active])
        least = np.repeat(np.minimum.reduceat(equal, begins), sizes)
        shared[active] += least
        active = active[least == width]
        width = min(4 * width, MAX_WIDTH)
    return shared


def _runs(group: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each run of equal numbers begins and how long it is."""
    begins = np.flatnonzero(np.append(True, group[1:] != group[:-1]))
    return begins, np.diff(np.append(begins, len(group)))
