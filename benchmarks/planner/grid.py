"""The paper's 65 points in simulation: density 0.80..1.40, sharing 0.05..0.45, Llama-3.1-8B on an A100, overlap on.

python benchmarks/planner/grid.py [--requests 100000] [--placement natural|…] [--dfs-tokens 2048] --output results.json
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from provenance import provenance
from synthetic import PLACEMENTS, job_of

from blendserve.planner.database import open_database
from blendserve.planner.performance_model import load_hardware, load_model_shape
from blendserve.planner.requests import compute_costs
from blendserve.planner.schedule import schedule_requests
from blendserve.planner.simulate import simulated_machine, summarize_run
from blendserve.planner.simulated_run import run_schedule
from blendserve.planner.workload import draw_mix

POLICIES = ("blend", "dfs")


def simulate_point(costs, machine, density: float, sharing: float, num_requests: int, placement: str) -> dict:
    random = np.random.default_rng(0)
    parts = draw_mix(costs, density=density, sharing=sharing, num_requests=num_requests, random=random)
    job = job_of(list(parts.values()), placement=placement)
    point = {"density": density, "sharing": sharing}
    for policy in POLICIES:
        schedule = schedule_requests(job.requests, policy=policy, seed=0, num_shards=1, costs=costs)
        point[policy] = summarize_run(run_schedule(job, schedule, machine))
    optimal = job.requests.shared_prefix_tokens.sum() / job.requests.num_prompt_tokens.sum()
    bound = max(schedule.ideal_compute_seconds, float(schedule.memory_seconds.sum()))
    return {
        **point,
        "speedup": point["dfs"]["seconds"] / point["blend"]["seconds"],
        "sharing_kept": point["blend"]["prefix_sharing"] / float(optimal),
        "over_bound": point["blend"]["seconds"] / bound,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--placement", choices=PLACEMENTS, default="natural")
    parser.add_argument("--dfs-tokens", type=int, default=512, help="tokens of a step of depth first; blend: 2048")
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--hardware", default="a100-80gb")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    origin = provenance()
    machine = simulated_machine(
        load_model_shape(arguments.model), load_hardware(arguments.hardware), is_overlapped=True
    )
    machine = replace(machine, unplanned_batched_tokens=arguments.dfs_tokens)
    started = time.monotonic()
    points = []
    with TemporaryDirectory() as folder, open_database(Path(folder)) as database:
        costs = partial(compute_costs, database, machine.constants)
        for density in np.round(np.arange(0.80, 1.401, 0.05), 2).tolist():
            for sharing in np.round(np.arange(0.05, 0.451, 0.10), 2).tolist():
                point = simulate_point(costs, machine, density, sharing, arguments.requests, arguments.placement)
                points.append(point)
                print(density, sharing, *(round(point[name], 4) for name in ("speedup", "sharing_kept", "over_bound")))
    speedups = [point["speedup"] for point in points]
    result = {
        **origin,
        "seconds": time.monotonic() - started,
        "mean_speedup": float(np.mean(speedups)),
        "least_speedup": min(speedups),
        "most_speedup": max(speedups),
        "least_sharing_kept": min(point["sharing_kept"] for point in points),
        "mean_over_bound": float(np.mean([point["over_bound"] for point in points])),
        "points": points,
    }
    print({name: value for name, value in result.items() if name != "points"})
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
