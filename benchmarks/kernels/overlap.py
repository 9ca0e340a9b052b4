"""What it gives to overlap decode attention with products, layer by layer, on one GPU.

    PYTHONPATH=kernels:. python benchmarks/kernels/overlap.py [--output FILE]

Layers of the Llama-3.1-8B shape with weights and KV caches of their own run one step each way, as one CUDA graph:

- sequential: the whole batch, one kernel after the other, as the engine does
- sides: decodes on one stream, prefill chunks on another, each with products of its own
- free: two nano-batches, each of half the decodes and half the chunks, each on a stream of its own
- ping-pong: the same nano-batches; one stream has all attention, the other all products, so that the attention of one
  nano-batch always runs beside the products of the other

`programs` is how many SMs decode attention may take; where products are "limited", ours run on the other SMs, with
tiles cut where they would not come out even; else cuBLAS and the fused MLP kernel take what they find. A gain is the
sequential time by the overlapped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.kernels.measuring import BLOCK_SIZE, DTYPE, HEAD_DIM, HEADS, KV_HEADS, PROJECTIONS, median_seconds
from blendserve_kernels.decode_attention import decode_attention, plan_decode
from blendserve_kernels.gluon_kernels import linear
from blendserve_kernels.gluon_kernels import prefill_attention as hopper_prefill
from blendserve_kernels.linear_silu_and_multiply import linear_silu_and_multiply
from blendserve_kernels.prefill_attention import plan_prefill, prefill_attention
from blendserve_kernels.rms_norm import add_rms_norm

HIDDEN, EPS, SCALE = 4096, 1e-5, HEAD_DIM**-0.5


@dataclass(frozen=True)
class Mix:
    num_decodes: int
    context_tokens: int
    num_chunk_tokens: int


MIXES = (
    Mix(1024, 440, 0),
    Mix(512, 880, 0),
    Mix(512, 880, 512),
    Mix(512, 880, 1536),
    Mix(384, 1100, 640),
    Mix(256, 1700, 1792),
)


class Layers:
    """Weights and KV caches of `count` layers."""

    def __init__(self, count: int, num_blocks: int, device: str) -> None:
        def weight(num_in: int, num_out: int) -> torch.Tensor:
            return torch.empty(num_out, num_in, dtype=DTYPE, device=device).normal_(0, 0.02)

        self.weights = [[weight(*shape) for shape in PROJECTIONS] for _ in range(count)]
        shape = (2, num_blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        self.caches = [torch.zeros(shape, dtype=DTYPE, device=device).normal_() for _ in range(count)]
        self.norm = torch.ones(HIDDEN, dtype=DTYPE, device=device)


class NanoBatch:
    """Part of a step, with its activations. Its blocks are its own."""

    def __init__(
        self,
        layers: Layers,
        decodes: range,
        context: int,
        num_chunk_tokens: int,
        programs: int | None,
        limit: int | None,
        chunk_context: int | None = None,
        prefill_programs: int | None = None,
    ) -> None:
        """decodes: which of the step's. limit: SMs that its products may take. chunk_context: tokens up to the end of
        its chunk, by default the chunk's. prefill_programs: SMs for the chunk's attention, all by default.
        """
        device = layers.norm.device
        self.layers, self.limit = layers, limit
        self.num_decodes, self.num_tokens = len(decodes), len(decodes) + num_chunk_tokens
        blocks = -(-context // BLOCK_SIZE)
        first = torch.arange(decodes.start, decodes.stop, device=device, dtype=torch.int32)[:, None] * blocks
        self.table = first + torch.arange(blocks, device=device, dtype=torch.int32)
        self.contexts = torch.full((len(decodes),), context, dtype=torch.int32, device=device)
        cache = layers.caches[0][0]
        self.plan = plan_decode(cache, self.table, self.contexts, HEADS, programs) if decodes else None
        self.chunk, self.prefill_programs = num_chunk_tokens, prefill_programs
        if num_chunk_tokens:
            chunk_context = chunk_context or num_chunk_tokens
            self.starts = torch.tensor([self.num_decodes, self.num_tokens], dtype=torch.int32, device=device)
            self.chunk_table = torch.arange(-(-chunk_context // BLOCK_SIZE), device=device, dtype=torch.int32)[None]
            self.chunk_context = torch.tensor([chunk_context], dtype=torch.int32, device=device)
            self.chunk_plan = plan_prefill(cache, self.starts, self.chunk_context, self.num_tokens, HEADS)
        self.x = torch.randn(self.num_tokens, HIDDEN, device=device).to(DTYPE)
        self.residual = torch.randn(self.num_tokens, HIDDEN, device=device).to(DTYPE)
        self.out = torch.zeros(self.num_tokens, HEADS, HEAD_DIM, dtype=DTYPE, device=device)
        self.q = self.out

    def product(self, x: torch.Tensor, weight: torch.Tensor, is_fused: bool = False) -> torch.Tensor:
        if self.limit is None:
            return linear_silu_and_multiply(x, weight) if is_fused else torch.nn.functional.linear(x, weight)
        width = weight.shape[0] // 2 if is_fused else weight.shape[0]
        out = torch.empty(len(x), width, dtype=DTYPE, device=x.device)
        linear.launch(x, weight, out, is_fused, self.limit, can_split=True)
        return out

    def before_attention(self, index: int) -> None:
        qkv = self.product(self.x, self.layers.weights[index][0])
        self.q = qkv[:, : HEADS * HEAD_DIM].reshape(-1, HEADS, HEAD_DIM)

    def attention(self, index: int) -> None:
        self.decode_attention(index)
        self.prefill_attention(index)

    def decode_attention(self, index: int) -> None:
        if not self.num_decodes:
            return
        k_cache, v_cache = self.layers.caches[index]
        rows = slice(self.num_decodes)
        decode_attention(
            self.q[rows],
            k_cache,
            v_cache,
            self.table,
            self.contexts,
            SCALE,
            plan=self.plan,
            out=self.out[rows],
        )

    def prefill_attention(self, index: int) -> None:
        if not self.chunk:
            return
        k_cache, v_cache = self.layers.caches[index]
        if self.prefill_programs is not None and self.chunk_plan is not None:
            plan = self.chunk_plan
            plan_fields = (plan.pack, plan.list_length, plan.block_list)
            hopper_prefill.launch(
                self.q, k_cache, v_cache, self.chunk_table, SCALE, *plan_fields, self.out, self.prefill_programs
            )
            return
        prefill_attention(
            self.q,
            k_cache,
            v_cache,
            self.chunk_table,
            self.starts,
            self.chunk_context,
            SCALE,
            self.chunk,
            plan=self.chunk_plan,
            out=self.out,
        )

    def after_attention(self, index: int) -> None:
        _, output, gate_up, down = self.layers.weights[index]
        norm = self.layers.norm
        normed, residual = add_rms_norm(self.product(self.out.flatten(1), output), self.residual, norm, EPS)
        fed_forward = self.product(self.product(normed, gate_up, is_fused=True), down)
        self.x, self.residual = add_rms_norm(fed_forward, residual, norm, EPS)


def in_sequence(batches: list[NanoBatch], count: int) -> None:
    for index in range(count):
        for batch in batches:
            batch.before_attention(index)
            batch.attention(index)
            batch.after_attention(index)


def side_by_side(batches: list[NanoBatch], count: int, streams: list[torch.cuda.Stream]) -> None:
    """Each batch on a stream of its own, from the first layer to the last."""
    current = torch.cuda.current_stream()
    for batch, stream in zip(batches, streams, strict=True):
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            in_sequence([batch], count)
    for stream in streams:
        current.wait_stream(stream)


def ping_pong(batches: list[NanoBatch], count: int, streams: list[torch.cuda.Stream]) -> None:
    """One stream has all attention, the other all products; the batches take turns."""
    current = torch.cuda.current_stream()
    attention, products = streams
    for stream in streams:
        stream.wait_stream(current)
    ended: list[torch.cuda.Event | None] = [None] * len(batches)
    for index in range(count + 1):
        for number, batch in enumerate(batches):
            with torch.cuda.stream(products):
                event = ended[number]
                if event is not None:
                    products.wait_event(event)
                    batch.after_attention(index - 1)
                if index < count:
                    batch.before_attention(index)
                ready = products.record_event()
            if index < count:
                with torch.cuda.stream(attention):
                    attention.wait_event(ready)
                    batch.attention(index)
                    ended[number] = attention.record_event()
    for stream in streams:
        current.wait_stream(stream)


def measure(layers: Layers, mix: Mix, num_sms: int, programs: list[int]) -> dict[str, Any]:
    count = len(layers.weights)
    streams = [torch.cuda.Stream(priority=-1), torch.cuda.Stream()]  # type: ignore[no-untyped-call]
    half = mix.num_decodes // 2

    def whole(limit: int | None = None) -> list[NanoBatch]:
        return [NanoBatch(layers, range(mix.num_decodes), mix.context_tokens, mix.num_chunk_tokens, None, limit)]

    def sides(programs: int, limit: int | None) -> list[NanoBatch]:
        return [
            NanoBatch(layers, range(mix.num_decodes), mix.context_tokens, 0, programs, None),
            NanoBatch(layers, range(0), mix.context_tokens, mix.num_chunk_tokens, None, limit),
        ]

    def halves(programs: int, limit: int | None) -> list[NanoBatch]:
        parts = (range(half), range(half, mix.num_decodes))
        chunk = mix.num_chunk_tokens // 2
        return [NanoBatch(layers, part, mix.context_tokens, chunk, programs, limit) for part in parts]

    def seconds(batches: list[NanoBatch], way: Callable[..., None], *more: object) -> float:
        return median_seconds([lambda: way(batches, count, *more)], num_replays=9) / count

    base = seconds(whole(), in_sequence)
    batch = whole()[0]
    attention = median_seconds([partial(batch.attention, index) for index in range(count)], 9)
    own = seconds(whole(num_sms), in_sequence)
    line: dict[str, Any] = {
        **vars(mix),
        "sequential_us": base * 1e6,
        "attention_us": attention * 1e6,
        "gains": {"sequential, own products": base / own},
    }
    ways: list[tuple[str, Callable[..., list[NanoBatch]], Callable[..., None]]] = [
        ("free", halves, side_by_side),
        ("ping-pong", halves, ping_pong),
    ]
    if mix.num_chunk_tokens:
        ways.append(("sides", sides, side_by_side))
    for name, parts, way in ways:
        for number in programs:
            limit = num_sms - number or None
            key = f"{name}, {number} programs{', limited' if limit else ''}"
            line["gains"][key] = base / seconds(parts(number, limit), way, streams)
    return line


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--commit", default="unknown")
    arguments = parser.parse_args()
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    num_blocks = max(mix.num_decodes * -(-mix.context_tokens // BLOCK_SIZE) for mix in MIXES)
    layers = Layers(arguments.layers, num_blocks, "cuda")
    lines = []
    for mix in MIXES:
        line = measure(layers, mix, num_sms, [28, 36, 44, num_sms])
        lines.append(line)
        best = sorted(line["gains"].items(), key=lambda item: -item[1])
        print(mix, f"{line['sequential_us']:.0f} us a layer, attention {line['attention_us']:.0f}", flush=True)
        for key, gain in best[:6] + best[-1:]:
            print(f"    {gain:.3f}  {key}", flush=True)
        if arguments.output:
            content = {
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "triton": triton.__version__,
                "commit": arguments.commit,
                "layers": arguments.layers,
                "mixes": lines,
            }
            arguments.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
