"""Other models, several devices and lengths that have to be sampled: the paper's four workloads, in simulation.

    python benchmarks/planner/mixes.py [--requests 100000] --output results.json

Data parallel compares one device with 2 and 4. Models that don't fit on one A100 take as many as hold them.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from provenance import provenance
from synthetic import job_of

from blendserve.planner.database import open_database
from blendserve.planner.performance_model import load_hardware, load_model_shape
from blendserve.planner.requests import compute_costs
from blendserve.planner.simulate import bound_seconds, simulated_machine, summarize_run
from blendserve.planner.simulated_run import run_policy
from blendserve.planner.workload import draw_mix

WORKLOADS = {"#1": (1.4, 0.35), "#2": (0.9, 0.35), "#3": (1.4, 0.05), "#4": (0.9, 0.05)}
MODELS = {
    "llama-3.1-8b": "a100-80gb",
    "llama-2-7b": "a100-80gb",
    "qwen2.5-7b": "a100-80gb",
    "llama-3.1-70b": "8xa100-80gb",
    "qwen2.5-72b": "8xa100-80gb",
    "deepseek-67b": "8xa100-80gb",
}


def simulate_workload(model: str, workload: str, num_requests: int) -> dict:
    machine = simulated_machine(load_model_shape(model), load_hardware(MODELS[model]), is_overlapped=True)
    density, sharing = WORKLOADS[workload]
    with TemporaryDirectory() as folder, open_database(Path(folder)) as database:
        costs = partial(compute_costs, database, machine.constants)
        random = np.random.default_rng(0)
        parts = draw_mix(costs, density=density, sharing=sharing, num_requests=num_requests, random=random)
        job = job_of(list(parts.values()))

        def seconds(policy: str, gpus: int = 1, lengths: str = "known") -> float:
            run = run_policy(job, policy=policy, gpus=gpus, lengths=lengths, machine=machine, costs=costs)
            return summarize_run(run.results)["seconds"]

        blend = seconds("blend")
        figures = {
            "model": model,
            "hardware": MODELS[model],
            "workload": workload,
            "blend_seconds": blend,
            "speedup_over_dfs": seconds("dfs") / blend,
            "over_bound": blend / bound_seconds(job, costs),
        }
        if model == "llama-3.1-8b":
            figures["data_parallel_2"] = blend / seconds("blend", gpus=2)
            figures["data_parallel_4"] = blend / seconds("blend", gpus=4)
            figures["sampled_over_known"] = seconds("blend", lengths="sampled") / blend
    return figures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    origin = provenance()
    started = time.monotonic()
    rows = []
    for model in MODELS:
        for workload in WORKLOADS:
            rows.append(simulate_workload(model, workload, arguments.requests))
            print(rows[-1], flush=True)
    result = {
        **origin,
        "seconds": time.monotonic() - started,
        "workloads": {name: dict(zip(("density", "sharing"), pair, strict=True)) for name, pair in WORKLOADS.items()},
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
