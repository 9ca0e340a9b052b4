"""Decodes and prefill chunks side by side give the same tokens as together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from blendserve.dual_scanner import DualScanner
from blendserve.engine.overlap import OverlapPolicy
from blendserve.engine.step_metrics import StepMetrics
from blendserve.planner.performance_model import cost_constants, load_hardware, load_model_shape, step_floor_seconds
from tests.engine.engine_runs import ListSource, generate, make_engine, make_prompts, run_engine, stated_requests

PROMPTS = make_prompts(16, seed=2)


@pytest.mark.parametrize("chunk_tokens", [12, 64])
def test_tokens_are_the_same(llama: Path, chunk_tokens: int) -> None:
    policy = OverlapPolicy(decode_programs=40, min_kv_tokens=1, min_prefill_tokens=2)
    engine = make_engine(llama, None, None, policy, max_num_batched_tokens=chunk_tokens, max_num_seqs=5)
    run = run_engine(engine, stated_requests(PROMPTS, 12), is_two_ended=True)
    assert run.token_ids() == generate(llama, PROMPTS, 12)
    assert any(step.num_decode_tokens and step.num_prefill_tokens > 2 for step in run.steps)


@pytest.mark.parametrize(
    ("num_decodes", "num_kv_tokens", "num_prefill_tokens", "expected"),
    [(0, 0, 500, 0), (50, 99, 500, 0), (50, 100, 99, 0), (50, 100, 100, 36), (50, 100, 801, 0)],
)
def test_a_step_runs_in_one_piece_unless_there_is_enough_of_both(
    num_decodes: int, num_kv_tokens: int, num_prefill_tokens: int, expected: int
) -> None:
    policy = OverlapPolicy(min_kv_tokens=100, min_prefill_tokens=100, max_prefill_tokens=800)
    assert policy.num_programs(num_decodes, num_kv_tokens, num_prefill_tokens) == expected


def test_a_step_has_room_for_the_prompts_that_take_as_long_as_reading_the_weights(llama: Path) -> None:
    stated = stated_requests([[number] * 20 for number in range(60)], 1)
    for request in stated[52:]:
        request["max_tokens"] = request["estimated_output_tokens"] = 100
    source = ListSource(stated, is_two_ended=True)
    is_right = np.arange(60) >= 52
    source.scanner = DualScanner(  # a token's products take a second, reading one from the KV cache a tenth
        compute_seconds=np.where(is_right, 120.0, 21.0),
        memory_seconds=np.where(is_right, 700.0, 2.05),
        unit_density=np.where(is_right, 0.2, 10.0),
        is_two_ended=True,
    )
    shape, hardware = load_model_shape(llama), load_hardware("h100")
    weights_tokens = step_floor_seconds(shape, hardware) / cost_constants(shape, hardware).seconds_per_kv_token
    engine = make_engine(llama, None, None, OverlapPolicy(min_prefill_tokens=1), max_num_seqs=64)
    steps: list[StepMetrics] = []
    engine.run(source, on_finished=lambda _: None, on_step=steps.append, should_stop=lambda: False)
    assert [step.num_decode_tokens for step in steps[1:20]] == [8] * 19
    assert {step.num_prefill_tokens for step in steps[1:20]} == {round(0.1 * weights_tokens) - 8}
