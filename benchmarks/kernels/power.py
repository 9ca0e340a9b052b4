"""Why overlap gains so little: power and clock of a GPU under products, under attention, one after the other, at once.

    PYTHONPATH=kernels:. python benchmarks/kernels/power.py [--ways WORDS …] [--output FILE]

Each way of overlap.py repeats for over a second, until the GPU is as hot and as slow as it gets; meanwhile nvidia-smi
is asked. `at once` runs decode attention and products that wait for nothing of each other. --ways: only
those whose names begin like this.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.measuring import hot_seconds
from benchmarks.kernels.overlap import Layers, Mix, NanoBatch, in_sequence, ping_pong
from benchmarks.kernels.reports import describe_run

NUM_LAYERS, SECONDS = 8, 1.6
MIXES = (Mix(1024, 440, 0), Mix(512, 880, 1536))
PROGRAMS = (28, 36, 44, 52)


def attention(batch: NanoBatch) -> None:
    for index in range(NUM_LAYERS):
        batch.attention(index)


def products(batch: NanoBatch) -> None:
    for index in range(NUM_LAYERS):
        batch.before_attention(index)
        batch.after_attention(index)


def at_once(decodes: NanoBatch, others: NanoBatch, streams: list[torch.cuda.Stream]) -> None:
    current = torch.cuda.current_stream()
    for stream in streams:
        stream.wait_stream(current)
    with torch.cuda.stream(streams[0]):
        attention(decodes)
    with torch.cuda.stream(streams[1]):
        products(others)
    for stream in streams:
        current.wait_stream(stream)


def measure(way: str, work: Callable[[], None]) -> dict[str, Any]:
    seconds, clock, watts = hot_seconds(work, SECONDS)
    microseconds = seconds * 1e6 / NUM_LAYERS
    line = {"way": way, "us_a_layer": microseconds, "clock": clock, "power": watts}
    print(f"{way:32} {microseconds:8.0f} us a layer  {clock}  {watts}", flush=True)
    return line


def measure_mix(layers: Layers, mix: Mix, num_sms: int, names: tuple[str, ...]) -> list[dict[str, Any]]:
    half, context, chunk = mix.num_decodes // 2, mix.context_tokens, mix.num_chunk_tokens
    streams = [torch.cuda.Stream(priority=-1), torch.cuda.Stream()]  # type: ignore[no-untyped-call]
    whole = NanoBatch(layers, range(mix.num_decodes), context, chunk, None, None)
    ways: dict[str, Callable[[], None]] = {
        "sequential": partial(in_sequence, [whole], NUM_LAYERS),
        "attention": partial(attention, whole),
        "products": partial(products, whole),
    }
    for programs in PROGRAMS:
        decodes = NanoBatch(layers, range(mix.num_decodes), context, 0, programs, None)
        limited = NanoBatch(layers, range(mix.num_decodes), context, chunk, None, num_sms - programs)
        parts = (range(half), range(half, mix.num_decodes))
        halves = [NanoBatch(layers, part, context, chunk // 2, programs, num_sms - programs) for part in parts]
        ways[f"decode attention on {programs}"] = partial(attention, decodes)
        ways[f"products on {num_sms - programs}"] = partial(products, limited)
        ways[f"ping-pong, {programs}"] = partial(ping_pong, halves, NUM_LAYERS, streams)
        ways[f"at once, {programs}"] = partial(at_once, decodes, limited, streams)
    return [measure(way, work) for way, work in ways.items() if way.startswith(names)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ways", nargs="+", default=[""])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    layers = Layers(NUM_LAYERS, 4096, "cuda")
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    names = tuple(arguments.ways)
    mixes = [{**vars(mix), "ways": measure_mix(layers, mix, num_sms, names)} for mix in MIXES]
    report = describe_run() | {"mixes": mixes}
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
