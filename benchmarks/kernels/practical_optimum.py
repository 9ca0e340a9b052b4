"""What a workload takes at best on this GPU: its average step with products and attention truly overlapped.

    PYTHONPATH=kernels:benchmarks/throughput:. python benchmarks/kernels/practical_optimum.py WORKLOAD [WORKLOAD …]
        [--output FILE]

WORKLOAD is a folder of benchmarks/throughput/workloads.py. All that its requests compute and read, with every shared
prefix computed once, is cut into steps of 1,024 tokens that are all alike: so many decodes of so much context, the rest
a chunk of a prompt. Eight layers of the Llama-3.1-8B shape run that step, with their part of the output head, each way
for over a second, as hot and as slow as the GPU gets:

- sequential: one kernel after the other
- beside: the chunk's attention on the SMs that decode attention leaves, products before and after
- at once: decode attention on some SMs; products and the chunk's attention, which wait for nothing of it, on the others
  (ours on so many, or cuBLAS on what it finds)
- taking turns: what a model's layers allow of that: two halves of the step, one's attention beside the other's products
- attention, products: each alone; the longer of both is what perfect overlap would take

Printed are the seconds of the whole workload, and those at the data sheet's peaks.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from ordered_requests import read_ordered_requests, sort_prompts

from benchmarks.kernels.measuring import DTYPE
from benchmarks.kernels.overlap import Layers, NanoBatch, in_sequence, ping_pong
from benchmarks.kernels.power import NUM_LAYERS, measure
from benchmarks.kernels.reports import Row, describe_run
from blendserve.planner.performance_model import cost_constants, load_hardware, load_model_shape

MODEL = load_model_shape("llama-3.1-8b")
STEP_TOKENS = 1024
PROGRAMS, USUAL_PROGRAMS = (28, 36, 44), 36  # SMs for decode attention


class Work(NamedTuple):
    """Of a workload: tokens of prompts that are computed, pairs of a query and a key in them, decoded tokens, and KV
    cache tokens that they read."""

    prefill_tokens: int
    pairs: int
    decode_tokens: int
    read_tokens: int

    @property
    def num_steps(self) -> float:
        return (self.prefill_tokens + self.decode_tokens) / STEP_TOKENS

    @property
    def peak_seconds(self) -> tuple[float, float]:
        """Compute and memory time at the H100's data sheet's peaks; the attention of decodes is computed, too."""
        costs = cost_constants(MODEL, load_hardware("h100"))
        compute = (self.prefill_tokens + self.decode_tokens) * costs.seconds_per_layer_token
        compute += self.decode_tokens * costs.seconds_per_sampled_token
        compute += (self.pairs + self.read_tokens) * costs.seconds_per_attended_pair
        return compute, self.read_tokens * costs.seconds_per_kv_token


def work_of(folder: Path) -> Work:
    """Each prefix computed once; a request's last token is never computed, its first is the prompt's."""
    requests = read_ordered_requests(folder, "dfs")
    order, shared = sort_prompts(requests.prompts)
    prompts = np.array([len(requests.prompts[place]) for place in order])
    decodes = np.maximum(requests.output_tokens[order] - 1, 0)
    return Work(
        int((prompts - shared).sum()),
        int((prompts * (prompts + 1) - shared * (shared + 1)).sum()) // 2,
        int(decodes.sum()),
        int((decodes * prompts + decodes * (decodes + 1) // 2).sum()),
    )


class Step:
    """The average step, in each way."""

    def __init__(self, layers: Layers, work: Work, num_sms: int) -> None:
        self.layers, self.num_sms = layers, num_sms
        self.num_decodes = round(STEP_TOKENS * work.decode_tokens / (work.prefill_tokens + work.decode_tokens))
        self.context = round(work.read_tokens / work.decode_tokens)
        self.chunk = STEP_TOKENS - self.num_decodes
        self.chunk_context = max(round(work.pairs / work.prefill_tokens + self.chunk / 2), self.chunk)
        self.head = torch.empty(MODEL.vocab_size, MODEL.hidden_size, dtype=DTYPE, device="cuda").normal_(0, 0.02)
        self.streams = [torch.cuda.Stream(priority=-1), torch.cuda.Stream()]  # type: ignore[no-untyped-call]

    def batch(self, programs: int | None = None, *, limits_products: bool = False) -> NanoBatch:
        others = self.num_sms - programs if programs else None
        return NanoBatch(
            self.layers,
            range(self.num_decodes),
            self.context,
            self.chunk,
            programs,
            others if limits_products else None,
            self.chunk_context,
            others,
        )

    def sequential(self, batch: NanoBatch) -> None:
        in_sequence([batch], NUM_LAYERS)
        self._head(batch)

    def attention(self, batch: NanoBatch) -> None:
        for index in range(NUM_LAYERS):
            batch.decode_attention(index)

    def products(self, batch: NanoBatch) -> None:
        for index in range(NUM_LAYERS):
            batch.before_attention(index)
            batch.prefill_attention(index)
            batch.after_attention(index)
        self._head(batch)

    def beside(self, batch: NanoBatch) -> None:
        for index in range(NUM_LAYERS):
            batch.before_attention(index)
            self._together(partial(batch.decode_attention, index), partial(batch.prefill_attention, index))
            batch.after_attention(index)
        self._head(batch)

    def halves(self, programs: int) -> list[NanoBatch]:
        middle = self.num_decodes // 2
        parts = (range(middle), range(middle, self.num_decodes))
        others = self.num_sms - programs
        sizes = (self.chunk // 2, self.chunk_context, programs)
        return [NanoBatch(self.layers, part, self.context, sizes[0], programs, others, *sizes[1:]) for part in parts]

    def taking_turns(self, batches: list[NanoBatch]) -> None:
        ping_pong(batches, NUM_LAYERS, self.streams)
        for batch in batches:
            torch.nn.functional.linear(batch.x[: batch.num_decodes * NUM_LAYERS // MODEL.num_layers], self.head)

    def at_once(self, batch: NanoBatch) -> None:
        self._together(partial(self.attention, batch), partial(self.products, batch))

    def _head(self, batch: NanoBatch) -> None:
        torch.nn.functional.linear(batch.x[: self.num_decodes * NUM_LAYERS // MODEL.num_layers], self.head)

    def _together(self, *parts: partial[None]) -> None:
        current = torch.cuda.current_stream()
        for stream, part in zip(self.streams, parts, strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                part()
        for stream in self.streams:
            current.wait_stream(stream)


def measure_workload(layers: Layers, folder: Path, num_sms: int) -> Row:
    work = work_of(folder)
    step = Step(layers, work, num_sms)
    print(f"{folder.name}: {work.num_steps:.0f} steps, {step.num_decodes} decodes of {step.context} tokens,", end=" ")
    print(f"{step.chunk} of a prompt up to {step.chunk_context}; at peaks", *work.peak_seconds, flush=True)
    ways = {"sequential": partial(step.sequential, step.batch())}
    for programs in PROGRAMS:
        ways[f"at once, {programs}"] = partial(step.at_once, step.batch(programs, limits_products=True))
        ways[f"taking turns, {programs}"] = partial(step.taking_turns, step.halves(programs))
    ways[f"at once, cuBLAS, {USUAL_PROGRAMS}"] = partial(step.at_once, step.batch(USUAL_PROGRAMS))
    for programs in (USUAL_PROGRAMS, PROGRAMS[-1]):
        ways[f"beside, {programs}"] = partial(step.beside, step.batch(programs))
    ways["attention"] = partial(step.attention, step.batch())
    ways["products"] = partial(step.products, step.batch())
    rows = []
    for name, way in ways.items():
        row = measure(name, way)
        row["workload_seconds"] = row["us_a_layer"] * MODEL.num_layers * work.num_steps * 1e-6
        rows.append(row)
        print(f"    {row['workload_seconds']:.1f} s", flush=True)
    return {"workload": folder.name, **work._asdict(), "peak_seconds": work.peak_seconds, "ways": rows}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workloads", nargs="+", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--commit", help="the commit measured, where the tree has no git")
    arguments = parser.parse_args()
    layers = Layers(NUM_LAYERS, 4096, "cuda")
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    rows = [measure_workload(layers, folder, num_sms) for folder in arguments.workloads]
    report = describe_run() | {"workloads": rows}
    report["commit"] = arguments.commit or report["commit"]
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
