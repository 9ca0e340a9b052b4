"""Makes the workloads of `run.py`: the paper's four traces, at a size for one GPU, with the order of each policy.

    python benchmarks/throughput/workloads.py --output FOLDER [--size short|small|medium|full] [--trace 1 2 3 4]

The recipe and the length tables are the planner's. A small trace takes about two minutes on an H100, a short one 50 s,
so that all its requests are in the KV cache at one time, a full one over half an hour. Of short and small ones outputs
are scaled down so that the longest takes about a third of a small run, and the mix of sources is solved anew for the
density and sharing of each trace with those lengths. Medium ones, of about four minutes, and full ones keep the lengths
of their sources, up to 4,096 and 16,384 tokens.
A trace is a folder with requests.parquet (prompt_token_ids, output_tokens) and orders.parquet (the planner's costs and
order).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ordered_requests import sort_prompts

from blendserve.planner.database import open_database
from blendserve.planner.performance_model import cost_constants, load_hardware, load_model_shape
from blendserve.planner.requests import compute_costs
from blendserve.planner.schedule import CostModel, PlannedRequests, schedule_requests
from blendserve.planner.workload import RequestLengths, draw_lengths, write_workload

TRACES = {1: (1.4, 0.35), 2: (0.9, 0.35), 3: (1.4, 0.05), 4: (0.9, 0.05)}  # density, sharing; paper, table 2
POLICIES = ("dfs", "random", "blend", "longest", "fcfs")
SOURCES = ("mmlu", "burstgpt", "openvid")


class Size(NamedTuple):
    """ideal_seconds: compute plus memory time at data-sheet peaks; a real run takes about one and a half times as long.

    mean_output_tokens: of the memory-heavy source, by default its own.
    """

    ideal_seconds: float
    longest_output_tokens: int
    mean_output_tokens: float | None = None


SIZES = {
    "short": Size(32.0, 1536, 1000.0),
    "small": Size(68.0, 1536, 1000.0),
    "medium": Size(160.0, 4096),
    "full": Size(1500.0, 16384),
}


def draw(source: str, count: int, size: Size, seed: int = 0) -> RequestLengths:
    """Lengths of one source; the memory-heavy one's outputs scaled to the size."""
    lengths = draw_lengths(source, max(count, 1), np.random.default_rng(seed))
    output = lengths.output_tokens
    if source == "openvid" and size.mean_output_tokens is not None:
        output = np.maximum(output * (size.mean_output_tokens / output.mean()), 8)
    return replace(lengths, output_tokens=np.clip(output, 1, size.longest_output_tokens).astype(np.int64))


def seconds_of(lengths: RequestLengths, costs: CostModel) -> tuple[float, float]:
    output = lengths.output_tokens.astype(np.float64)
    compute, memory = costs(
        num_prompt_tokens=lengths.prompt_tokens,
        shared_prefix_tokens=lengths.shared_tokens,
        mean_output_tokens=output,
        mean_square_output_tokens=output**2,
    )
    return float(compute.sum()), float(memory.sum())


def mix(density: float, sharing: float, size: Size, costs: CostModel) -> list[RequestLengths]:
    """How many of each source: both conditions are linear in the counts; the size is the third."""
    typical = 14_042
    samples = [draw(source, typical, size) for source in SOURCES]
    times = np.array([seconds_of(sample, costs) for sample in samples]) / typical
    prompts = np.array([sample.prompt_tokens.mean() for sample in samples])
    shared = np.array([sample.shared_tokens.mean() for sample in samples])
    conditions = np.array([shared - sharing * prompts, times[:, 0] - density * times[:, 1], times.sum(axis=1)])
    counts = np.linalg.solve(conditions, np.array([0.0, 0.0, size.ideal_seconds]))
    if (counts < 0).any():
        raise SystemExit(f"No mix has density {density} and sharing {sharing} with outputs of {size}.")
    return [draw(source, round(count), size, seed=1) for source, count in zip(SOURCES, counts, strict=True)]


def orders_of(prompts: list[np.ndarray], output_tokens: np.ndarray, costs: CostModel) -> pa.Table:
    """Row, policy, position in its order, and costs there."""
    rows, shared = sort_prompts(prompts)
    mean = output_tokens[rows].astype(np.float64)
    lengths = np.array([len(prompts[row]) for row in rows], dtype=np.int64)
    requests = PlannedRequests(lengths, shared, mean, mean**2, rows)
    tables = []
    for policy in POLICIES:
        schedule = schedule_requests(requests, policy=policy, seed=0, num_shards=1, costs=costs)
        columns = {
            "row": rows[schedule.positions],
            "position": np.arange(len(rows)),
            "compute_seconds": schedule.compute_seconds,
            "memory_seconds": schedule.memory_seconds,
            "unit_density": schedule.unit_density,
        }
        tables.append(pa.table({"policy": [policy] * len(rows), **columns}))
    return pa.concat_tables(tables)


def make_trace(trace: int, size_name: str, folder: Path, model: str, hardware: str) -> dict:
    density, sharing = TRACES[trace]
    size = SIZES[size_name]
    constants = cost_constants(load_model_shape(model), load_hardware(hardware))
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as temporary, open_database(Path(temporary)) as database:
        costs = partial(compute_costs, database, constants)
        parts = mix(density, sharing, size, costs)
        write_workload(folder / "requests.parquet", parts, np.random.default_rng(trace))
        table = pq.read_table(folder / "requests.parquet")
        prompts = [prompt.values.to_numpy() for prompt in table.column("prompt_token_ids")]
        output_tokens = table.column("output_tokens").to_numpy()
        pq.write_table(orders_of(prompts, output_tokens, costs), folder / "orders.parquet", compression="zstd")
        compute, memory = (sum(seconds) for seconds in zip(*(seconds_of(part, costs) for part in parts), strict=True))
    facts = {
        "trace": trace,
        "size": size_name,
        "model": model,
        "hardware": hardware,
        "num_requests": {source: len(part.group) for source, part in zip(SOURCES, parts, strict=True)},
        "num_prompt_tokens": sum(int(part.prompt_tokens.sum()) for part in parts),
        "num_shared_tokens": sum(int(part.shared_tokens.sum()) for part in parts),
        "num_output_tokens": int(output_tokens.sum()),
        "longest_output_tokens": int(output_tokens.max()),
        "compute_seconds": compute,
        "memory_seconds": memory,
    }
    (folder / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    return facts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--trace", type=int, nargs="+", choices=list(TRACES), default=list(TRACES))
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--hardware", default="h100")
    arguments = parser.parse_args()
    for trace in arguments.trace:
        folder = arguments.output / f"trace-{trace}-{arguments.size}"
        print(json.dumps(make_trace(trace, arguments.size, folder, arguments.model, arguments.hardware)))


if __name__ == "__main__":
    main()
