"""Tiny seeded models of every architecture, requests for them, and what transformers generates for those."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from blendserve.dual_scanner import DualScanner
from blendserve.engine.engine import LLMEngine
from blendserve.engine.overlap import OverlapPolicy
from blendserve.engine.request import Completion, Request
from blendserve.engine.sampler import request_seed
from blendserve.engine.step_metrics import StepMetrics
from blendserve.manifest import PlanManifest, ShardPlan, write_manifest
from blendserve.schemas import SCHEDULED_REQUESTS
from blendserve.spec import EngineSpec, SamplingSpec

ModelFactory = Callable[..., Path]
TEST_DEVICE = os.environ.get("BLENDSERVE_TEST_DEVICE", "cpu")  # the same tests run on a GPU with cuda
NUM_BYTES = 256
END = NUM_BYTES  # the end-of-text token
TINY = {
    "vocab_size": NUM_BYTES + 1,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "eos_token_id": END,
    "bos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}


def save_tiny_model(folder: Path, model_type: str = "llama", seed: int = 0, **overrides: Any) -> Path:
    """A model with random weights, and a tokenizer of one token a byte, as save_pretrained writes them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)} | {"<end>": END}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**TINY, **overrides}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # created as zeros and ones, which would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def generate(folder: Path, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """The greedy continuation of each prompt by transformers, in float32, up to and including the end token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        mask = torch.ones_like(ids)
        output = model.generate(ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0)
        outputs.append(output[0, len(prompt) :].tolist())
    return outputs


def make_prompts(num_prompts: int, *, seed: int = 0, num_prefixes: int = 3, longest: int = 40) -> list[list[int]]:
    """Prompts of 1 to `longest` tokens more than one of a few shared prefixes of 0, 21, 42 … tokens."""
    generator = np.random.default_rng(seed)
    prefixes = [generator.integers(0, NUM_BYTES, 21 * number).tolist() for number in range(num_prefixes)]
    lengths = generator.integers(1, longest + 1, num_prompts)
    return [
        prefixes[index % num_prefixes] + generator.integers(0, NUM_BYTES, length).tolist()
        for index, length in enumerate(lengths)
    ]


class ListSource:
    """Requests from a list, in its order or from both ends."""

    learner = None
    lengths = None  # no timetable

    def __init__(self, requests: Sequence[dict[str, Any]], *, is_two_ended: bool = False) -> None:
        self._requests = requests
        num_requests = len(requests)
        self.scanner = DualScanner(
            compute_seconds=np.linspace(2.0, 1.0, num_requests),
            memory_seconds=np.linspace(1.0, 2.0, num_requests),
            unit_density=np.linspace(2.0, 0.5, num_requests),
            is_two_ended=is_two_ended,
        )

    def request(self, position: int) -> Request:
        stated = self._requests[position]
        return Request(
            position=position,
            row_index=stated["row_index"],
            request_id=f"request-{stated['row_index']}",
            prompt_token_ids=np.array(stated["prompt_token_ids"], dtype=np.int32),
            max_tokens=stated["max_tokens"],
            estimated_output_tokens=stated.get("estimated_output_tokens", stated["max_tokens"]),
            seed=request_seed(0, f"request-{stated['row_index']}"),
        )


@dataclass
class EngineRun:
    """Completions by row, and the steps they took."""

    completions: dict[int, Completion]
    steps: list[StepMetrics]

    def token_ids(self) -> list[list[int]]:
        return [list(self.completions[row].token_ids) for row in sorted(self.completions)]

    def total(self, column: str) -> int:
        return sum(getattr(step, column) for step in self.steps)


def stated_requests(prompts: Sequence[Sequence[int]], max_tokens: int, **more: Any) -> list[dict[str, Any]]:
    return [
        {"row_index": row, "prompt_token_ids": list(prompt), "max_tokens": max_tokens, **more}
        for row, prompt in enumerate(prompts)
    ]


def make_engine(
    folder: Path,
    sampling: SamplingSpec | None = None,
    max_in_flight: int | None = None,
    overlap: OverlapPolicy | None = None,
    **spec: Any,
) -> LLMEngine:
    """A float32 engine on TEST_DEVICE with 256 blocks of 8 tokens, unless `spec` says otherwise."""
    defaults = {"device": TEST_DEVICE, "dtype": "float32", "block_size": 8, "num_blocks": 256}
    engine_spec = EngineSpec(**{**defaults, **spec})
    return LLMEngine(folder, engine_spec, sampling or SamplingSpec(), max_in_flight=max_in_flight, overlap=overlap)


def run_engine(
    engine: LLMEngine,
    requests: Sequence[dict[str, Any]],
    *,
    is_two_ended: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> EngineRun:
    """Run the requests; each must come out once at most."""
    run = EngineRun({}, [])

    def on_finished(completion: Completion) -> None:
        assert completion.row_index not in run.completions
        run.completions[completion.row_index] = completion

    source = ListSource(requests, is_two_ended=is_two_ended)
    engine.run(source, on_finished=on_finished, on_step=run.steps.append, should_stop=should_stop)
    return run


def write_plan(
    plan_dir: Path,
    model: Path,
    requests: Sequence[dict[str, Any]],
    *,
    plan_id: str = "plan",
    sampling: SamplingSpec | None = None,
    **spec: Any,
) -> PlanManifest:
    """A plan of one shard, admitted from both ends, in row groups of 7."""
    num_requests = len(requests)
    rows = [
        {
            "shard_position": position,
            "row_index": stated["row_index"],
            "request_id": f"request-{stated['row_index']}",
            "prompt_token_ids": stated["prompt_token_ids"],
            "max_tokens": stated["max_tokens"],
            "estimated_output_tokens": stated["max_tokens"],
            "shared_prefix_tokens": 0,
            "num_prompt_tokens": len(stated["prompt_token_ids"]),
            "compute_seconds": 1.0,
            "memory_seconds": 1.0,
            "unit_id": 0,
            "unit_density": float(num_requests - position),
        }
        for position, stated in enumerate(requests)
    ]
    shard_plan = ShardPlan(
        shard=0,
        file="shards/shard-00000.parquet",
        num_requests=num_requests,
        num_prompt_tokens=sum(len(stated["prompt_token_ids"]) for stated in requests),
        estimated_output_tokens=sum(stated["max_tokens"] for stated in requests),
        compute_seconds=1.0,
        memory_seconds=1.0,
        predicted_seconds=1.0,
    )
    plan = PlanManifest(
        plan_id=plan_id,
        policy="blend",
        is_two_ended=True,
        model=str(model),
        hardware="cpu",
        sampling=sampling or SamplingSpec(),
        engine=EngineSpec(**{"device": "cpu", "block_size": 8, "num_blocks": 256, **spec}),
        completions="../completions",
        shards=(shard_plan,),
        summary={},
    )
    (plan_dir / "shards").mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema=SCHEDULED_REQUESTS)
    pq.write_table(table, plan_dir / "shards/shard-00000.parquet", row_group_size=7)
    write_manifest(plan_dir / "plan.json", plan)
    return plan
