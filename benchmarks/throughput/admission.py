"""CPU time that the engine's scheduler takes a step with 2,000 running requests, and for each that it admits.

    PYTHONPATH=kernels:. python benchmarks/throughput/admission.py [--paced 1] --output results.json

Long outputs run while short ones with long prompts come and go; nothing is computed. `full` has no short ones: steps in
which nothing that waits fits into the cache.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import islice
from pathlib import Path

import numpy as np

from benchmarks.dry_run import DryRun
from blendserve.dual_scanner import DualScanner
from blendserve.engine.kv_cache import KVCache
from blendserve.engine.request import Request
from blendserve.engine.scheduler import Scheduler

NUM_RUNNING, NUM_STEPS, BLOCK_SIZE = 2000, 800, 128
SHORT_PROMPT, SHORT_OUTPUT, LONG_PROMPT, LONG_OUTPUT = 400, 2, 20, 4000


class Source:
    """`num_short` prompts with short outputs and `num_long` short ones with long outputs."""

    learner = lengths = None

    def __init__(self, num_short: int, num_long: int) -> None:
        self._prompt = np.r_[np.full(num_short, SHORT_PROMPT), np.full(num_long, LONG_PROMPT)]
        self._output = np.r_[np.full(num_short, SHORT_OUTPUT), np.full(num_long, LONG_OUTPUT)]
        compute = 2e-5 * (self._prompt + self._output)
        memory = 4e-8 * (self._prompt * self._output + self._output**2 / 2)
        self._random = np.random.default_rng(0)
        self.scanner = DualScanner(
            compute_seconds=compute, memory_seconds=memory, unit_density=compute / memory, is_two_ended=True
        )

    def request(self, position: int) -> Request:
        return Request(
            position=position,
            row_index=position,
            request_id=str(position),
            prompt_token_ids=self._random.integers(0, 30_000, int(self._prompt[position]), dtype=np.int32),
            max_tokens=int(self._output[position]),
            estimated_output_tokens=int(self._output[position]),
        )


class TimedScheduler(Scheduler):
    """Keeps the CPU time of every step's admission, and how many it admitted."""

    def __init__(self, *arguments: object, **settings: object) -> None:
        super().__init__(*arguments, **settings)
        self.admissions: list[tuple[float, int, int]] = []

    def _admit(self, batch) -> None:
        waiting, started = self.num_waiting, time.thread_time()  # of this thread: other work doesn't count
        super()._admit(batch)
        seconds = time.thread_time() - started
        self.admissions.append((seconds, waiting - self.num_waiting, self.running.num_active))


def measure(source: Source, paced_tokens: int | None) -> dict[str, float]:
    capacity = NUM_RUNNING * (LONG_PROMPT + LONG_OUTPUT)
    scheduler = TimedScheduler(
        source,
        KVCache(capacity // BLOCK_SIZE, BLOCK_SIZE, True),
        max_num_seqs=2 * NUM_RUNNING,
        max_num_batched_tokens=8192,
        max_model_len=32_768,
        paced_tokens=paced_tokens,
        weights_tokens=capacity // 2,  # so that a paced step wants all of the long ones
    )
    steps = [step.schedule_seconds for step in islice(DryRun(scheduler).steps(), NUM_STEPS)]
    seconds, admitted, num_running = (
        np.array(values)[NUM_STEPS // 2 :] for values in zip(*scheduler.admissions, strict=True)
    )
    return {
        "mean_running": float(num_running.mean()),
        "admitted_a_step": float(admitted.mean()),
        "admission_milliseconds_a_step": float(1e3 * seconds.mean()),
        "admission_microseconds_a_request": float(1e6 * seconds.sum() / max(admitted.sum(), 1)),
        "schedule_milliseconds_a_step": float(1e3 * np.mean(steps[NUM_STEPS // 2 :])),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--paced", type=int, help="least prefill tokens of a step, as where overlap is on")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    result = {
        "busy": measure(Source(60_000, NUM_RUNNING), arguments.paced),
        "full": measure(Source(0, 4 * NUM_RUNNING), arguments.paced),
    }
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
