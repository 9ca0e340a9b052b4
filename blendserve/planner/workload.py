"""Makes workloads of any density, prefix sharing and size by the paper's recipe, from quantile tables in the package.

Three sources are mixed: `mmlu` (prompts that share long prefixes), `burstgpt` (compute-heavy) and `openvid`
(memory-heavy outputs). The tables hold quantiles of request lengths, made from published traces.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from blendserve.errors import UsageError
from blendserve.manifest import replacing
from blendserve.planner.database import open_database
from blendserve.planner.performance_model import cost_constants, load_hardware, load_model_shape
from blendserve.planner.requests import compute_costs
from blendserve.planner.schedule import CostModel

SHARING_SOURCE: Final = "mmlu"
COMPUTE_SOURCE: Final = "burstgpt"
MEMORY_SOURCE: Final = "openvid"
_SOURCES: Final = (SHARING_SOURCE, COMPUTE_SOURCE, MEMORY_SOURCE)
WORKLOAD_SCHEMA: Final = pa.schema([("prompt_token_ids", pa.list_(pa.int32())), ("output_tokens", pa.int32())])
_VOCABULARY: Final = 30_000  # token ids that every built-in model has
_BATCH_ROWS: Final = 8192
_FITTING_ROUNDS: Final = 14
_TYPICAL_REQUESTS: Final = 14_042  # of each source, to know its means; all of mmlu once


@dataclass(frozen=True, slots=True)
class RequestLengths:
    """Requests of one source; arrays [num_requests]. group: which prefix a prompt begins with, -1 for none."""

    group: NDArray[np.int64]
    prefix_tokens: NDArray[np.int64]
    own_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]

    @property
    def prompt_tokens(self) -> NDArray[np.int64]:
        return self.prefix_tokens + self.own_tokens

    @property
    def shared_tokens(self) -> NDArray[np.int64]:
        """Tokens that a depth-first order shares with the request before; requests of a group stand together."""
        is_first = np.concatenate([np.ones(1, np.bool_), np.diff(self.group) != 0])[: len(self.group)]
        return np.where(is_first | (self.group < 0), 0, self.prefix_tokens)


def draw_lengths(source: str, num_requests: int, random: np.random.Generator) -> RequestLengths:
    """`num_requests` of `source`, spread evenly over its quantiles. Raises UsageError on an unknown source."""
    tables = _tables()
    if source not in tables["sources"]:
        raise UsageError(f"Unknown source of lengths '{source}'. Expected one of {', '.join(tables['sources'])}.")
    table = tables["sources"][source]

    def draw(quantiles: list[int]) -> NDArray[np.int64]:
        marks = (random.permutation(num_requests) + 0.5) / max(num_requests, 1)
        return np.maximum(np.rint(np.interp(marks, tables["probabilities"], quantiles)), 1).astype(np.int64)

    group = np.full(num_requests, -1)
    prefix = np.zeros(num_requests, np.int64)
    if "groups" in table:
        sizes = np.array(table["groups"]["num_requests"])
        prefixes = np.array(table["groups"]["prefix_tokens"])
        repeats = -(-num_requests // int(sizes.sum()))
        group = np.repeat(np.arange(repeats * len(sizes)), np.tile(sizes, repeats))
        group = np.sort(group[random.permutation(len(group))[:num_requests]])
        prefix = prefixes[group % len(sizes)]
    return RequestLengths(group, prefix, draw(table["input_tokens"]), draw(table["output_tokens"]))


def generate_workload(
    path: Path,
    *,
    density: float,
    sharing: float,
    num_requests: int,
    model: str,
    hardware: str,
    seed: int = 0,
) -> dict[str, Any]:
    """Write a workload to `path` (columns `prompt_token_ids`, `output_tokens`) and return what it holds.

    `density` is compute over memory time of the whole at perfect sharing; `sharing` the shareable part of the prompt
    tokens. Raises UsageError when no mix of the sources has them.
    """
    if num_requests < 1:
        raise UsageError(f"A workload needs at least 1 request, got {num_requests}.")
    random = np.random.default_rng(seed)
    constants = cost_constants(load_model_shape(model), load_hardware(hardware))
    with TemporaryDirectory() as folder, open_database(Path(folder)) as database:
        costs = partial(compute_costs, database, constants)
        lengths = draw_mix(costs, density=density, sharing=sharing, num_requests=num_requests, random=random)
        reached = _density([_totals(costs, part) for part in lengths.values()])
    num_prompt_tokens = write_workload(path, list(lengths.values()), random)
    shared = sum(int(part.shared_tokens.sum()) for part in lengths.values())
    return {
        "path": str(path),
        "num_requests": num_requests,
        "num_prompt_tokens": num_prompt_tokens,
        "num_output_tokens": sum(int(part.output_tokens.sum()) for part in lengths.values()),
        "sources": {source: len(part.group) for source, part in lengths.items()},
        "sharing": shared / num_prompt_tokens,
        "density": reached,
    }


def draw_mix(
    costs: CostModel, *, density: float, sharing: float, num_requests: int, random: np.random.Generator
) -> dict[str, RequestLengths]:
    """Lengths of the requests of each source that together have `density` and `sharing`; see `generate_workload`."""
    counts = _mix_sources(costs, density=density, sharing=sharing, num_requests=num_requests)
    lengths = {source: draw_lengths(source, count, random) for source, count in counts.items()}
    lengths[MEMORY_SOURCE] = _fit_density(costs, lengths, density)
    return lengths


def _mix_sources(costs: CostModel, *, density: float, sharing: float, num_requests: int) -> dict[str, int]:
    """How many requests of each source there are.

    Per compute-heavy request there are x sharing ones and y memory-heavy ones; both conditions are linear in x, y.
    """
    random = np.random.default_rng(0)
    conditions = {}
    for source in _SOURCES:
        total = _totals(costs, draw_lengths(source, _TYPICAL_REQUESTS, random))
        conditions[source] = (total.shared - sharing * total.prompt, total.compute - density * total.memory)
    matrix = np.array([conditions[SHARING_SOURCE], conditions[MEMORY_SOURCE]]).T
    sharing_part, memory_part = np.linalg.solve(matrix, -np.array(conditions[COMPUTE_SOURCE]))
    if sharing_part < 0 or memory_part < 0:
        raise UsageError(
            f"No mix of {', '.join(_SOURCES)} has density {density} and sharing {sharing}. "
            "Expected a density below that of burstgpt and a sharing between 0 and that of mmlu (0.84)."
        )
    scale = num_requests / (1 + sharing_part + memory_part)
    num_sharing, num_memory = round(sharing_part * scale), round(memory_part * scale)
    return {
        SHARING_SOURCE: num_sharing,
        COMPUTE_SOURCE: num_requests - num_sharing - num_memory,
        MEMORY_SOURCE: num_memory,
    }


def write_workload(path: Path, parts: list[RequestLengths], random: np.random.Generator) -> int:
    """Write the requests of `parts` in random order with token ids that share just the groups' prefixes.

    Each source's prompts begin with a token of their own, as they do where each task has its template.
    Returns the number of prompt tokens.
    """
    part_of = np.repeat(np.arange(len(parts)), [len(part.group) for part in parts])
    group, prefix, own, output = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("group", "prefix_tokens", "own_tokens", "output_tokens")
    )
    order = random.permutation(len(group))
    with replacing(path) as temporary, pq.ParquetWriter(temporary, WORKLOAD_SCHEMA, use_dictionary=False) as writer:
        for begin in range(0, len(order), _BATCH_ROWS):
            rows = order[begin : begin + _BATCH_ROWS]
            tokens = _token_ids(part_of[rows], group[rows], prefix[rows], own[rows], random)
            columns = {"prompt_token_ids": tokens, "output_tokens": output[rows].astype(np.int32)}
            writer.write_table(pa.table(columns, schema=WORKLOAD_SCHEMA))
    return int((prefix + own).sum())


@dataclass(frozen=True, slots=True)
class _Totals:
    shared: float
    prompt: float
    compute: float
    memory: float


@cache
def _tables() -> dict[str, Any]:
    content = files("blendserve.planner").joinpath("data/request_lengths.json").read_text(encoding="utf-8")
    tables: dict[str, Any] = json.loads(content)
    return tables


def _totals(costs: CostModel, lengths: RequestLengths) -> _Totals:
    """Sums over the requests of a source."""
    output = lengths.output_tokens.astype(np.float64)
    compute, memory = costs(
        num_prompt_tokens=lengths.prompt_tokens,
        shared_prefix_tokens=lengths.shared_tokens,
        mean_output_tokens=output,
        mean_square_output_tokens=output**2,
    )
    return _Totals(
        shared=float(lengths.shared_tokens.sum()),
        prompt=float(lengths.prompt_tokens.sum()),
        compute=float(compute.sum()),
        memory=float(memory.sum()),
    )


def _density(totals: list[_Totals]) -> float:
    memory = sum(total.memory for total in totals)
    return sum(total.compute for total in totals) / memory if memory > 0 else 0.0


def _fit_density(costs: CostModel, lengths: dict[str, RequestLengths], density: float) -> RequestLengths:
    """The memory-heavy requests, all longer or all shorter by one factor, so that a small workload is exact too."""
    drawn = lengths[MEMORY_SOURCE]
    others = [_totals(costs, part) for source, part in lengths.items() if source != MEMORY_SOURCE]
    low, high = 0.2, 5.0
    for _ in range(_FITTING_ROUNDS):
        factor = (low * high) ** 0.5
        scaled = replace(drawn, output_tokens=np.maximum(np.rint(drawn.output_tokens * factor), 1).astype(np.int64))
        if _density([*others, _totals(costs, scaled)]) > density:
            low = factor
        else:
            high = factor
    return scaled


def _token_ids(
    part: NDArray[np.int64],
    group: NDArray[np.int64],
    prefix: NDArray[np.int64],
    own: NDArray[np.int64],
    random: np.random.Generator,
) -> pa.ListArray:
    """Prompts of `prefix + own` tokens; the prefix depends on the group alone, the first token on the part."""
    lengths = prefix + own
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    tokens = random.integers(10, _VOCABULARY, int(offsets[-1]), dtype=np.int32)
    shared = int(prefix.sum())
    begins = np.repeat(offsets[:-1], prefix)
    places = np.arange(shared) - np.repeat(np.cumsum(prefix) - prefix, prefix)
    mixed = (np.repeat(group, prefix).astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (places.astype(np.uint64) + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)) >> np.uint64(33)
    tokens[begins + places] = (mixed % np.uint64(_VOCABULARY - 10) + np.uint64(10)).astype(np.int32)
    tokens[offsets[:-1]] = part.astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(tokens))
