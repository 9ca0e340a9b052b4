"""Decodes and prefill chunks side by side: the same tokens as together, and only where a profile says that it pays."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from blendserve import hardware_profile
from blendserve.dual_scanner import DualScanner
from blendserve.engine.overlap import OverlapPolicy, overlap_policy
from blendserve.engine.step_metrics import StepMetrics
from blendserve.hardware_profile import SideBySide, write_profile
from blendserve.planner.performance_model import cost_constants, load_hardware, load_model_shape, step_floor_seconds
from tests.engine.engine_runs import ListSource, generate, make_engine, make_prompts, run_engine, stated_requests
from tests.profiles import H100, LLAMA, make_profile

PROMPTS = make_prompts(16, seed=2)
ALWAYS = OverlapPolicy(
    tuple(SideBySide(num_kv_tokens=1, num_prefill_tokens=n, num_programs=40, gain=2 - n / 100) for n in range(1, 65))
)


@pytest.mark.parametrize("chunk_tokens", [12, 64])
def test_tokens_are_the_same(llama: Path, chunk_tokens: int) -> None:
    engine = make_engine(llama, None, None, ALWAYS, max_num_batched_tokens=chunk_tokens, max_num_seqs=5)
    run = run_engine(engine, stated_requests(PROMPTS, 12), is_two_ended=True)
    assert run.token_ids() == generate(llama, PROMPTS, 12)
    assert any(step.num_decode_tokens and step.num_prefill_tokens > 2 for step in run.steps)


@pytest.mark.parametrize(
    ("num_decodes", "num_kv_tokens", "num_prefill_tokens", "expected"),
    [
        (0, 0, 1000, 0),
        (50, 70_000, 1000, 0),
        (50, 100_000, 700, 0),
        (50, 100_000, 1000, 28),
        (50, 900_000, 1100, 28),
        (50, 300_000, 1500, 36),
        (50, 300_000, 3000, 0),
    ],
)
def test_a_step_runs_side_by_side_where_one_like_it_gained_by_that(
    num_decodes: int, num_kv_tokens: int, num_prefill_tokens: int, expected: int
) -> None:
    points = ((100_000, 1000, 28, 1.05), (300_000, 1500, 36, 1.07), (300_000, 1500, 44, 1.06))
    names = ("num_kv_tokens", "num_prefill_tokens", "num_programs", "gain")
    policy = OverlapPolicy(tuple(SideBySide(**dict(zip(names, point, strict=True))) for point in points))
    assert policy.num_programs(num_decodes, num_kv_tokens, num_prefill_tokens) == expected
    assert policy.paced_tokens == 1500


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
    engine = make_engine(llama, None, None, ALWAYS, max_num_seqs=64)
    steps: list[StepMetrics] = []
    engine.run(source, on_finished=lambda _: None, on_step=steps.append, should_stop=lambda: False)
    assert [step.num_decode_tokens for step in steps[1:20]] == [8] * 19
    assert {step.num_prefill_tokens for step in steps[1:20]} == {round(0.1 * weights_tokens) - 8}


def test_the_profile_of_this_gpu_and_model_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hardware_profile, "PROFILES", tmp_path)
    pays, loses = (
        SideBySide(num_kv_tokens=200_000, num_prefill_tokens=1024, num_programs=36, gain=gain) for gain in (1.05, 1.01)
    )
    write_profile(tmp_path / "a.json", make_profile(side_by_side=(pays, loses)))
    assert overlap_policy(H100, LLAMA) == OverlapPolicy((pays,))
    write_profile(tmp_path / "a.json", make_profile(side_by_side=(loses,)))
    assert overlap_policy(H100, LLAMA) is None
    with caplog.at_level(logging.WARNING):
        assert overlap_policy("NVIDIA H200", LLAMA) is None
    assert "no profile" in caplog.text and "NVIDIA H200" in caplog.text
