"""What a shard file carries so that the engine can go on learning output lengths: classes, lengths seen, costs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
from numpy.typing import NDArray

from blendserve.length_learning import LEARNING_KEY
from blendserve.planner.length_classes import length_classes
from blendserve.planner.output_lengths import FIXED, HINT, HISTORY, OutputLengths
from blendserve.planner.performance_model import CostConstants
from blendserve.planner.prefix_tree import build_prefix_tree
from blendserve.planner.requests import RequestStates
from blendserve.schemas import COMPLETIONS, SCHEDULED_REQUESTS

_MOST_OBSERVED: Final = 10_000  # as many as a sample of a million; each shard file has a copy


@dataclass(frozen=True, slots=True)
class LearningInputs:
    """classes: int32 [num_requests, num_levels] of all requests, below 0 where the length is known. `observed`: places
    of those that have run. begun_token_ids: what cut-off requests have generated, with the row each belongs to."""

    classes: NDArray[np.int32]
    states: RequestStates
    observed: NDArray[np.int64]
    begun_token_ids: pa.ListArray
    begun_rows: NDArray[np.int64]
    constants: CostConstants

    def schema(self) -> pa.Schema:
        """SCHEDULED_REQUESTS with what is common to all requests of a shard in its metadata."""
        seen = self.observed
        common = {
            **asdict(self.constants),
            "classes": self.classes[seen].tolist(),
            "num_tokens": self.states.observed[seen].astype(np.int64).tolist(),
            "is_cut_off": self.states.is_cut_off[seen].tolist(),
        }
        return SCHEDULED_REQUESTS.with_metadata({LEARNING_KEY: json.dumps(common).encode()})

    def classes_of(self, rows: NDArray[np.int64]) -> pa.ListArray:
        """The classes of the places `rows`."""
        classes = self.classes[rows]
        offsets = np.arange(len(rows) + 1, dtype=np.int32) * classes.shape[1]
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(classes.reshape(-1)))

    def begun_of(self, rows: NDArray[np.int64]) -> pa.Array:
        """What each of the places `rows` has generated; null where nothing."""
        if len(self.begun_rows) == 0:
            return pa.nulls(len(rows), SCHEDULED_REQUESTS.field("generated_token_ids").type)
        wanted = self.states.row_index[rows]
        places = np.minimum(np.searchsorted(self.begun_rows, wanted), len(self.begun_rows) - 1)
        return self.begun_token_ids.take(pa.array(places, mask=self.begun_rows[places] != wanted))


def learning_inputs(
    states: RequestStates,
    lengths: OutputLengths,
    constants: CostConstants,
    completions: list[Path],
    *,
    may_resume: bool,
) -> LearningInputs:
    """`may_resume`: whether requests that the sample cut off go on where they stopped, instead of beginning again."""
    classes = length_classes(build_prefix_tree(states.shared_prefix_tokens), states.num_prompt_tokens)
    classes[np.isin(lengths.source, (FIXED, HINT, HISTORY))] = -1
    seen = np.flatnonzero(~np.isnan(states.observed) & ~states.is_duplicate & (classes[:, 0] >= 0))
    seen = seen[np.linspace(0, len(seen) - 1, min(len(seen), _MOST_OBSERVED)).astype(np.int64)]
    begun = np.sort(states.row_index[states.is_begun]) if may_resume else np.zeros(0, np.int64)
    tokens = pa.array([], SCHEDULED_REQUESTS.field("generated_token_ids").type)
    if len(begun):
        names = ["row_index", "completion_token_ids"]
        files = pads.dataset([str(path) for path in completions], schema=COMPLETIONS, format="parquet")
        table = files.to_table(columns=names, filter=pads.field("row_index").isin(pa.array(begun))).sort_by("row_index")
        begun = table.column("row_index").to_numpy()
        tokens = table.column("completion_token_ids").combine_chunks()
    return LearningInputs(classes, states, seen, tokens, begun, constants)
