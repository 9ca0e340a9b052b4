"""Sorting prompts by their tokens and finding what neighbours share, both in one pass over the shared prefixes.

Prompts that are equal so far are a group. All of a group are compared with one of them: how many tokens they share with
it, and whether they come before or after it, puts them into branches whose order is known. The few tokens after that
split each branch into those that go their own way and smaller groups. DuckDB sorts by all of these, NumPy compares.
Memory is a few numbers a prompt, the tokens stay in their file.
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
_BEYOND: Final = 2**40  # more than any prompt has tokens
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
    depth, branch = _compared_with_last(prompts, rows, group, depth)
    left = prompts.lengths[rows] - depth
    keys = prompts.windows(rows, depth, _KEY_TOKENS)
    by = _sorted_within_groups(database, group, branch, keys, left)
    order[places], depth, branch, left, keys = rows[by], depth[by], branch[by], left[by], keys[by]
    is_together, is_alike = group[1:] == group[:-1], branch[1:] == branch[:-1]
    differs = keys[1:] != keys[:-1]
    limit = np.minimum(left[1:], left[:-1])
    equal = np.minimum(limit, np.where(differs.any(axis=1), differs.argmax(axis=1), _KEY_TOKENS))
    common = np.minimum(depth[1:], depth[:-1]) + np.where(is_alike, equal, 0)
    shared[places[1:][is_together]] = common[is_together]
    goes_on = is_together & is_alike & (equal == _KEY_TOKENS) & (limit > _KEY_TOKENS)
    begins = np.append(True, ~goes_on)
    stays = ~begins | np.append(goes_on, False)
    return places[stays], np.cumsum(begins)[stays], (depth + _KEY_TOKENS)[stays]


def _compared_with_last(
    prompts: PromptTokens, rows: NDArray[np.int64], group: NDArray[np.int64], depth: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many tokens each row shares with its group's last in all, and its branch: ascending in lexical order.

    Before the last come those that share least with it first, after it those that share most. Of equal keys the last
    is the longest, so that prompts which are prefixes of each other are told apart at once.
    """
    last = np.repeat(rows[_begins(group)[1:] - 1], np.diff(_begins(group)))
    depth = depth + _num_shared(prompts, rows, last, depth)
    is_over = prompts.lengths[last] == depth
    next_of_last = prompts.windows(last, depth, 1)[:, 0]
    own_next = prompts.windows(rows, depth, 1)[:, 0]
    comes_after = np.where(is_over, prompts.lengths[rows] > depth, own_next > next_of_last)
    return depth, np.where(comes_after, _BEYOND - depth, depth)


def _sorted_within_groups(
    database: duckdb.DuckDBPyConnection,
    group: NDArray[np.int64],
    branch: NDArray[np.int64],
    keys: NDArray[np.int32],
    left: NDArray[np.int64],
) -> NDArray[np.int64]:
    """int64 [num_rows]: the rows in lexical order of `keys` [num_rows, _KEY_TOKENS], branch by branch of each group."""
    tokens = {f"token_{number}": keys[:, number] for number in range(_KEY_TOKENS)}
    columns = {
        "place": np.arange(len(group)),
        "group_number": group,
        "branch": branch,
        **tokens,
        "num_tokens_left": left,
    }
    found = compute(database, "split_groups", tables={"unsettled": pa.table(columns)})
    return np.asarray(found.column("place").to_numpy(), np.int64)


def _num_shared(
    prompts: PromptTokens, rows: NDArray[np.int64], others: NDArray[np.int64], depth: NDArray[np.int64]
) -> NDArray[np.int64]:
    """int64 [num_rows]: how many tokens after `depth` each of `rows` shares with that of `others`."""
    shared = np.where(rows == others, prompts.lengths[rows] - depth, 0)
    active, width = np.flatnonzero(rows != others), _FIRST_WIDTH
    while len(active):
        equal = prompts.num_equal(rows[active], others[active], (depth + shared)[active], width)
        shared[active] += equal
        active = active[equal == width]
        width = min(4 * width, MAX_WIDTH)
    return shared


def _begins(group: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each run of equal numbers begins, and at the end how many there are."""
    return np.flatnonzero(np.concatenate([np.ones(1, np.bool_), group[1:] != group[:-1], np.ones(1, np.bool_)]))
