"""CPU time to decide what to admit, a step, with 2,000 requests running.

python benchmarks/planner/admission.py --output results.json
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
from synthetic import job_of

from blendserve.planner.database import open_database
from blendserve.planner.performance_model import load_hardware, load_model_shape
from blendserve.planner.requests import compute_costs
from blendserve.planner.schedule import schedule_requests
from blendserve.planner.simulate import simulated_machine
from blendserve.planner.simulated_run import shard_of
from blendserve.planner.simulator import Simulator
from blendserve.planner.workload import RequestLengths

NUM_RUNNING = 2000
NUM_SHORT, SHORT_PROMPT, SHORT_OUTPUT = 60_000, 400, 2
LONG_PROMPT, LONG_OUTPUT = 20, 4000


class TimedSimulator(Simulator):
    """Keeps the time of every step's admission and how many requests ran."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.admit_seconds: list[float] = []
        self.num_running: list[int] = []

    def _admit(self) -> None:
        started = time.thread_time()  # of this thread: other work on the machine doesn't count
        super()._admit()
        self.admit_seconds.append(time.thread_time() - started)
        self.num_running.append(len(self._running))


def lengths(count: int, prompt: int, output: int) -> RequestLengths:
    zeros = np.zeros(count, np.int64)
    return RequestLengths(zeros - 1, zeros, zeros + prompt, zeros + output)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    origin = provenance()
    machine = simulated_machine(load_model_shape("llama-3.1-8b"), load_hardware("h200"), is_overlapped=True)
    # Memory work as cheap as if 2,000 long requests were what a step wants, and a cache that just holds them.
    constants = replace(machine.constants, seconds_per_kv_token=machine.step_seconds / 4e6)
    capacity = NUM_RUNNING * LONG_OUTPUT * 4 // 3
    machine = replace(machine, constants=constants, capacity_tokens=capacity, max_num_seqs=4096)
    parts = [lengths(NUM_SHORT, SHORT_PROMPT, SHORT_OUTPUT), lengths(2 * NUM_RUNNING, LONG_PROMPT, LONG_OUTPUT)]
    job = job_of(parts)
    with TemporaryDirectory() as folder, open_database(Path(folder)) as database:
        costs = partial(compute_costs, database, constants)
        schedule = schedule_requests(job.requests, policy="blend", seed=0, num_shards=1, costs=costs)
    shard = shard_of(schedule, 0, np.arange(job.num_requests), job, job.lengths)
    simulator = TimedSimulator(job.simulated_requests(), machine, shard)
    simulator.run()
    is_busy = np.array(simulator.num_running) >= NUM_RUNNING
    milliseconds = 1000 * np.array(simulator.admit_seconds)[is_busy]
    result = {
        **origin,
        "num_steps": int(is_busy.sum()),
        "mean_milliseconds": float(milliseconds.mean()),
        "p99_milliseconds": float(np.percentile(milliseconds, 99)),
        "mean_running": float(np.array(simulator.num_running)[is_busy].mean()),
    }
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
