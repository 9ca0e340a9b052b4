"""BlendServe's part of `run.py`: python blendserve_engine.py REQUEST.json RESULT.jsonl"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import triton
from ordered_requests import OrderedRequests, read_ordered_requests

from blendserve.dual_scanner import DualScanner
from blendserve.engine.engine import LLMEngine
from blendserve.engine.request import Completion, Request
from blendserve.engine.step_metrics import StepMetrics, metrics_table
from blendserve.known_lengths import KnownLengths
from blendserve.spec import EngineSpec, SamplingSpec


class Source:
    """The requests as the scheduler asks for them."""

    learner = None  # their lengths are known

    def __init__(self, requests: OrderedRequests, count: int | None = None) -> None:
        self._requests = requests
        self.lengths = _lengths(requests, count) if requests.is_two_ended else None
        self.scanner = DualScanner(
            compute_seconds=requests.compute_seconds[:count],
            memory_seconds=requests.memory_seconds[:count],
            unit_density=requests.unit_density[:count],
            is_two_ended=requests.is_two_ended,
        )

    def request(self, position: int) -> Request:
        output_tokens = int(self._requests.output_tokens[position])
        return Request(
            position=position,
            row_index=position,
            request_id=str(position),
            prompt_token_ids=self._requests.prompts[position],
            max_tokens=output_tokens,
            estimated_output_tokens=output_tokens,
        )


def _lengths(requests: OrderedRequests, count: int | None) -> KnownLengths:
    prompts = requests.prompts[:count]
    shared = np.zeros(len(prompts), dtype=np.int64)
    for number, (before, prompt) in enumerate(itertools.pairwise(prompts), start=1):
        length = min(len(before), len(prompt))
        differs = before[:length] != prompt[:length]
        shared[number] = differs.argmax() if differs.any() else length
    prompt_tokens = np.array([len(prompt) for prompt in prompts])
    return KnownLengths(prompt_tokens, requests.output_tokens[:count].astype(np.int64), shared)


def run(engine: LLMEngine, requests: OrderedRequests, steps_path: Path | None) -> dict:
    completions: list[Completion] = []
    steps: list[StepMetrics] = []
    started = time.perf_counter()
    engine.run(Source(requests), on_finished=completions.append, on_step=steps.append, should_stop=lambda: False)
    seconds = time.perf_counter() - started
    failed = [completion.error for completion in completions if completion.error]
    assert not failed, failed[:3]
    lengths = sorted(len(completion.token_ids) for completion in completions)
    assert lengths == sorted(requests.output_tokens.tolist())
    if steps_path is not None:
        pq.write_table(metrics_table(steps), steps_path)
    return {
        "seconds": seconds,
        "tokens_per_second": requests.num_tokens / seconds,
        "num_tokens": requests.num_tokens,
        "prefix_sharing": sum(step.num_cached_tokens for step in steps) / requests.num_prompt_tokens,
        "num_steps": len(steps),
        "num_preempted": sum(step.num_preempted for step in steps),
        "gpu_busy": engine.busy_seconds / seconds,
        "host_waiting": engine.waiting_seconds / seconds,
    }


def note_compiled(*, repr: str, **_: object) -> None:
    print("compiled after the warm-up:", repr, flush=True)


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    stated = {**request["settings"]["limits"], "block_size": 128, **request["settings"]["options"]}
    spec = EngineSpec(device="cuda", load_format="dummy", **stated)
    loaded = time.perf_counter()
    engine = LLMEngine(Path(request["model"]), spec, SamplingSpec(ignore_eos=True))
    print("loaded in", time.perf_counter() - loaded, flush=True)
    warmed = time.perf_counter()
    print(engine.warm_up(), "shapes in", time.perf_counter() - warmed, flush=True)
    triton.knobs.runtime.jit_post_compile_hook = note_compiled
    with Path(sys.argv[2]).open("w") as results:
        for number, job in enumerate(request["jobs"]):
            requests = read_ordered_requests(Path(job["folder"]), job["order"])
            engine.clear_prefix_cache()
            steps_path = Path(sys.argv[2]).parent / f"steps-{number}.parquet"
            figures = run(engine, requests, steps_path)
            figures["device"] = torch.cuda.get_device_name()
            figures["torch"] = torch.__version__
            results.write(json.dumps(figures) + "\n")
            results.flush()


if __name__ == "__main__":
    main()
