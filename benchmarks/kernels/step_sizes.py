"""How long a layer takes in steps of different sizes, with the GPU as hot and as slow as it gets.

    PYTHONPATH=kernels:benchmarks/throughput:. python benchmarks/kernels/step_sizes.py [--output FILE]

Eight layers of the Llama-3.1-8B shape run whole steps, decodes beside two prompts, each for half a second and more.
What the decodes read is the same in all, so that only the products differ, and what goes with them.
"""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path

import torch
from run import LLAMA_3_1_8B

from benchmarks.kernels.measuring import BLOCK_SIZE, DTYPE, HEAD_DIM, KV_HEADS, hot_seconds
from benchmarks.kernels.reports import Row, run_and_report
from blendserve.models.batch import DecodePart, ModelBatch, PrefillPart
from blendserve.models.config import ModelConfig
from blendserve.models.llama import LayerCache, LlamaModel
from blendserve.models.weights import dummy_weights

NUM_LAYERS, NUM_BLOCKS, SECONDS = 8, 3750, 0.5
NUM_DECODES, CONTEXT = 400, 1000
SIZES = (416, *range(512, 2049, 128), 3072, 8192)


def make_batch(num_decodes: int, num_tokens: int) -> ModelBatch:
    """Decodes of CONTEXT tokens, each in blocks of its own somewhere in the cache, and two prompts for the rest."""
    blocks = -(-CONTEXT // BLOCK_SIZE)
    table = torch.randperm(NUM_BLOCKS)[: num_decodes * blocks].view(num_decodes, blocks)
    positions = [torch.full((num_decodes,), CONTEXT - 1)]
    slots = [table[:, -1] * BLOCK_SIZE + (CONTEXT - 1) % BLOCK_SIZE]
    rest = num_tokens - num_decodes
    prompts = [rest // 2, rest - rest // 2] if rest > 1 else []
    prompt_table = torch.randperm(NUM_BLOCKS)[: 64 * len(prompts)].view(len(prompts), 64)
    for row, length in zip(prompt_table, prompts, strict=True):
        place = torch.arange(length)
        positions.append(place)
        slots.append(row[place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE)

    def there(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return values.to("cuda", dtype)

    lengths = torch.tensor(prompts)
    decodes = there(table, torch.int32), there(torch.full((num_decodes,), CONTEXT), torch.int32)
    bounds = there(num_decodes + torch.cat((torch.zeros(1), lengths.cumsum(0))), torch.int32)
    count = num_decodes + sum(prompts)
    return ModelBatch(
        token_ids=torch.randint(0, 100_000, (count,), device="cuda"),
        positions=there(torch.cat(positions), torch.int64),
        slot_mapping=there(torch.cat(slots), torch.int64),
        decode=DecodePart(*decodes) if num_decodes else None,
        prefill=PrefillPart(there(prompt_table, torch.int32), bounds, there(lengths, torch.int32), max(prompts))
        if prompts
        else None,
    )


def measure(model: LlamaModel, caches: list[LayerCache], num_decodes: int, num_tokens: int) -> Row:
    batch = make_batch(num_decodes, num_tokens)
    seconds, clock, watts = hot_seconds(partial(model.forward, batch, caches), SECONDS)
    return {
        "decodes": num_decodes,
        "tokens": num_tokens,
        "us_a_layer": seconds / NUM_LAYERS * 1e6,
        "us_a_layer_and_token": seconds / NUM_LAYERS * 1e6 / num_tokens,
        "clock": clock,
        "power": watts,
    }


@torch.inference_mode()
def run() -> Row:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(LLAMA_3_1_8B | {"num_hidden_layers": NUM_LAYERS}))
        config = ModelConfig.load(folder)
    model = LlamaModel(config, dummy_weights(config, DTYPE, torch.device("cuda")), 32768)
    shape = (2, NUM_BLOCKS, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    caches: list[LayerCache] = []
    for _ in range(NUM_LAYERS):
        keys, values = torch.empty(shape, device="cuda", dtype=DTYPE).normal_()
        caches.append((keys, values))
    sizes = [(NUM_DECODES, size) for size in SIZES] + [(0, 1024), (0, 8192)]
    return {"context": CONTEXT, "rows": [measure(model, caches, *size) for size in sizes]}


if __name__ == "__main__":
    run_and_report(__doc__, run)
