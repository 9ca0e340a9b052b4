"""The step `analyze`: sort the prompts, find what neighbours share, name exact duplicates, build the prefix tree."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from blendserve.job_folder import JobFolder
from blendserve.planner.database import compute, open_database, write_relation
from blendserve.planner.prefix_tree import build_prefix_tree
from blendserve.planner.sorted_prompts import sort_prompts
from blendserve.schemas import PREFIX_NODES, SORTED_REQUESTS


@dataclass(frozen=True, slots=True)
class PrefixSummary:
    """What the prompts have in common. `num_shared_tokens` is the most that any order can reuse, to the token."""

    num_requests: int
    num_prompt_tokens: int
    num_shared_tokens: int
    num_duplicates: int

    @property
    def prefix_sharing(self) -> float:
        return self.num_shared_tokens / max(self.num_prompt_tokens, 1)


def analyze(folder: JobFolder, *, dedupe: bool) -> PrefixSummary:
    """Write the relations `sorted_requests` and `prefix_nodes` of the tokenized requests.

    `dedupe`: a row with the same prompt and max_tokens as an earlier one becomes a duplicate of it.
    """
    tokenized = folder.relation("tokenized_requests")
    prompts = sort_prompts(tokenized, folder.work)
    shared = prompts.shared_prefix_tokens
    neighbours = pq.read_table(tokenized, columns=["row_index", "num_prompt_tokens", "max_tokens"])
    neighbours = neighbours.take(pa.array(prompts.file_position))
    neighbours = neighbours.append_column("sort_position", pa.array(np.arange(len(shared))))
    neighbours = neighbours.append_column("shared_prefix_tokens", pa.array(shared))
    with open_database(folder.work) as database:
        sorted_requests = compute(
            database, "sorted_requests", parameters={"dedupe": dedupe}, tables={"neighbours": neighbours}
        )
    write_relation(folder.relation("sorted_requests"), sorted_requests, SORTED_REQUESTS)
    write_relation(folder.relation("prefix_nodes"), build_prefix_tree(shared).to_table(), PREFIX_NODES)
    return PrefixSummary(
        num_requests=len(shared),
        num_prompt_tokens=int(sorted_requests.column("num_prompt_tokens").to_numpy().sum(dtype=np.int64)),
        num_shared_tokens=int(shared.sum(dtype=np.int64)),
        num_duplicates=len(shared) - sorted_requests.column("duplicate_of").null_count,
    )
