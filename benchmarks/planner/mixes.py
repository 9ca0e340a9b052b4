"""The paper's four workloads for six models, mixes of other traces, several devices, and lengths that are learnt.

    python benchmarks/planner/mixes.py [--requests 100000] [--models llama-3.1-8b,…] [--gpus 2,4] --output results.json

Depth first is simulated as engines run it that know no output lengths (admit what fits, preempt when full), over
sources that are shuffled, natural (MMLU's prompts begin alike and stand together) and clustered, one task after the
other. Models that don't fit
on one A100 take as many as hold them.
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
from synthetic import PLACEMENTS, job_of

from blendserve.planner.database import open_database
from blendserve.planner.performance_model import load_hardware, load_model_shape
from blendserve.planner.requests import compute_costs
from blendserve.planner.simulate import bound_seconds, simulated_machine, summarize_run
from blendserve.planner.simulated_run import run_policy
from blendserve.planner.workload import draw_lengths, draw_mix

WORKLOADS = {"#1": (1.4, 0.35), "#2": (0.9, 0.35), "#3": (1.4, 0.05), "#4": (0.9, 0.05)}
# Other traces as they are, by shares of the requests; nothing is shared.
MIXES = {
    "azure": {"azure_conversation": 0.7, "azure_code": 0.3},
    "sharegpt": {"sharegpt": 1.0},
    "azure + reasoning": {"azure_code": 0.5, "azure_conversation": 0.35, "reasoning": 0.15},
    "sharegpt + reasoning": {"sharegpt": 0.9, "reasoning": 0.1},
}
MODELS = {
    "llama-3.1-8b": "a100-80gb",
    "llama-2-7b": "a100-80gb",
    "qwen2.5-7b": "a100-80gb",
    "llama-3.1-70b": "8xa100-80gb",
    "qwen2.5-72b": "8xa100-80gb",
    "deepseek-67b": "8xa100-80gb",
}


def draw_parts(costs, workload: str, num_requests: int) -> list:
    random = np.random.default_rng(0)
    if workload in MIXES:
        return [draw_lengths(source, round(share * num_requests), random) for source, share in MIXES[workload].items()]
    density, sharing = WORKLOADS[workload]
    return list(draw_mix(costs, density=density, sharing=sharing, num_requests=num_requests, random=random).values())


def simulate_workload(model: str, workload: str, num_requests: int, gpus: list[int], is_learnt: bool) -> dict:
    machine = simulated_machine(load_model_shape(model), load_hardware(MODELS[model]), is_overlapped=True)
    with TemporaryDirectory() as folder, open_database(Path(folder)) as database:
        costs = partial(compute_costs, database, machine.constants)
        parts = draw_parts(costs, workload, num_requests)
        job, natural, shuffled = (job_of(parts, placement=name) for name in PLACEMENTS)

        def run(job, policy: str, num_gpus: int = 1, lengths: str = "known") -> dict:
            done = run_policy(job, policy=policy, gpus=num_gpus, lengths=lengths, machine=machine, costs=costs)
            return summarize_run(done.results)

        blend = run(job, "blend")
        seconds = blend["seconds"]
        figures = {
            "model": model,
            "hardware": MODELS[model],
            "workload": workload,
            "blend_seconds": seconds,
            "sharing_kept": blend["prefix_sharing"] / job.prefix_sharing if job.prefix_sharing else 1.0,
            "over_bound": seconds / bound_seconds(job, costs),
            "speedup_over_dfs_clustered": run(job, "dfs")["seconds"] / seconds,
            "speedup_over_dfs_natural": run(natural, "dfs")["seconds"] / run(natural, "blend")["seconds"],
            "speedup_over_dfs_shuffled": run(shuffled, "dfs")["seconds"] / run(shuffled, "blend")["seconds"],
        }
        for number in gpus:
            figures[f"data_parallel_{number}"] = seconds / run(job, "blend", number)["seconds"]
        if is_learnt:
            figures["learnt_over_known"] = run(job, "blend", lengths="sampled")["seconds"] / seconds
            learnt = run(shuffled, "blend", lengths="sampled")["seconds"]
            figures["learnt_over_known_shuffled"] = learnt / run(shuffled, "blend")["seconds"]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--workloads", default=",".join([*WORKLOADS, *MIXES]))
    parser.add_argument("--gpus", default="")
    parser.add_argument("--learnt", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    origin = provenance()
    started = time.monotonic()
    gpus = [int(number) for number in arguments.gpus.split(",") if number]
    rows = []
    for model in arguments.models.split(","):
        for workload in arguments.workloads.split(","):
            rows.append(simulate_workload(model, workload, arguments.requests, gpus, arguments.learnt))
            print(rows[-1], flush=True)
            result = {
                **origin,
                "seconds": time.monotonic() - started,
                "workloads": {name: {"density": pair[0], "sharing": pair[1]} for name, pair in WORKLOADS.items()},
                "rows": rows,
            }
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
