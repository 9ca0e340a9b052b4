"""Whether a simulated run takes as long as the real one: fits a profile to a run's steps and replays others with it.

    python benchmarks/throughput/calibration.py --run FOLDER=STEPS.parquet [--run …] --order dfs [--output results.json]

FOLDER is a workload, STEPS the metrics of BlendServe's run of it by `run.py --keep`. To each run's steps a profile is
fitted, and with that every run is replayed: the engine's own scheduler and prefix cache on a clock that follows the
planner's simulated machine. The prompts' attention is part of the fitted cost of a token.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from blendserve_engine import Source
from numpy.typing import NDArray
from ordered_requests import OrderedRequests, read_ordered_requests
from run import LIMITS

from benchmarks.dry_run import DryRun
from blendserve.engine.kv_cache import KVCache
from blendserve.engine.profiler import fit_steps
from blendserve.engine.scheduler import Scheduler
from blendserve.planner.performance_model import CostConstants, load_model_shape
from blendserve.planner.simulation import SimulatedMachine

BLOCK_SIZE = 128
MODEL = load_model_shape("llama-3.1-8b")


def machine_of(steps: dict[str, NDArray[np.float64]]) -> SimulatedMachine:
    """A machine that takes as long as these steps did."""
    tokens = steps["num_prefill_tokens"] + steps["num_decode_tokens"]
    features = np.stack([np.ones(len(tokens)), tokens, steps["num_decode_tokens"], steps["kv_read_bytes"]], axis=1)
    usual = np.ones(len(tokens), dtype=np.bool_)
    for most in (0.5, 0.3, 0.15, 0.1):  # a step that had to wait for something else says nothing of its parts
        coefficients, free_tokens = fit_steps(features[usual], steps["step_seconds"][usual])
        charged = features - np.array([0, 1, 0, 0]) * np.minimum(tokens, free_tokens)[:, None]
        usual = np.abs(charged @ coefficients / steps["step_seconds"] - 1) < most
    fixed, token, sampled, kv_byte = coefficients
    constants = CostConstants(token, sampled, 0.0, kv_byte * MODEL.kv_bytes_per_token(2))
    floor = min(free_tokens * token, fixed)
    return SimulatedMachine(
        constants=constants,
        step_seconds=floor,
        overhead_seconds=fixed - floor,
        capacity_tokens=int(steps["num_total_blocks"][0]) * BLOCK_SIZE,
        max_batched_tokens=LIMITS["max_num_batched_tokens"],
        interference=1.0,
    )


def replay_seconds(requests: OrderedRequests, machine: SimulatedMachine) -> float:
    """What a run of the requests takes on the machine."""
    cache = KVCache(machine.capacity_tokens // BLOCK_SIZE, BLOCK_SIZE, True)
    scheduler = Scheduler(Source(requests), cache, **LIMITS)
    constants, seconds = machine.constants, 0.0
    for batch, *_ in DryRun(scheduler).steps():
        tokens = batch.num_prefill_tokens + len(batch.decode_rows)
        compute = (
            tokens * constants.seconds_per_layer_token + len(batch.decode_rows) * constants.seconds_per_sampled_token
        )
        seconds += machine.step(compute, int(batch.decode_positions.sum()) + len(batch.decode_rows)).seconds
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", action="append", required=True, metavar="FOLDER=STEPS")
    parser.add_argument("--order", default="dfs")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for named in arguments.run:
        folder, path = named.split("=", 1)
        table = pq.read_table(path)
        steps = {name: table[name].to_numpy().astype(np.float64) for name in table.column_names}
        requests = read_ordered_requests(Path(folder), arguments.order)
        ended = float((steps["started_seconds"] + steps["step_seconds"]).max())
        runs.append({"name": Path(folder).name, "requests": requests, "seconds": ended, "machine": machine_of(steps)})
    rows = []
    for fitted in runs:
        for run in runs:
            simulated = replay_seconds(run["requests"], fitted["machine"])
            rows.append(
                {"fitted_to": fitted["name"], "run": run["name"], "seconds": run["seconds"], "simulated": simulated}
            )
            print(rows[-1] | {"simulated_over_real": simulated / run["seconds"]}, flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps({"order": arguments.order, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
