"""What each policy would take for a job that is analyzed and maybe sampled: the table that `blendserve plan` shows."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from blendserve.job_folder import JobFolder
from blendserve.planner.database import open_database
from blendserve.planner.length_history import recall
from blendserve.planner.performance_model import cost_constants, load_model_shape
from blendserve.planner.plan import estimate_lengths, planned_requests, rows_to_run
from blendserve.planner.planned_engine import plan_hardware, planned_limits, planned_machine
from blendserve.planner.requests import compute_costs, read_request_states
from blendserve.planner.schedule import schedule_requests
from blendserve.planner.simulate import POLICIES, bound_seconds, summarize_run
from blendserve.planner.simulated_job import SimulatedJob
from blendserve.planner.simulated_run import run_schedule
from blendserve.spec import JobSpec


def compare_policies(folder: JobFolder, spec: JobSpec, model_folder: Path) -> dict[str, Any]:
    """Simulate what is left to run of the job under each policy, every request as long as it is estimated to be.

    Each of the job's GPUs runs its part in one go, as shards that follow one another do. Compute and memory work
    overlap where the engine overlaps them. Returns `policies` (as `simulate` has them, and `device_hours`: of all GPUs
    together; with a price their `cost`),
    `prefix_sharing_optimal` and `bound_seconds`.
    """
    hardware = plan_hardware(spec, model_folder)
    shape = load_model_shape(model_folder)
    machine = planned_machine(spec, shape, hardware)
    gpus = min(spec.gpus, spec.shards or spec.gpus)
    with open_database(folder.work) as database:
        states = read_request_states(database, folder)
        rows = rows_to_run(states)
        lengths = estimate_lengths(states, spec, recall(database, folder, states))
        requests = planned_requests(states, lengths, rows, planned_limits(spec, hardware))
        job = SimulatedJob.of_estimates(requests)
        costs = partial(compute_costs, database, cost_constants(shape, hardware))
        runs = {}
        for policy in POLICIES:
            schedule = schedule_requests(requests, policy=policy, seed=spec.seed, num_shards=gpus, costs=costs)
            results = run_schedule(job, schedule, machine)
            device_hours = sum(result.seconds for result in results) / 3600
            runs[policy] = {**summarize_run(results), "device_hours": device_hours}
            if spec.device_hour_price is not None:
                runs[policy]["cost"] = device_hours * spec.device_hour_price
        bound = bound_seconds(job, costs) / gpus
    return {"policies": runs, "prefix_sharing_optimal": job.prefix_sharing, "bound_seconds": bound}
