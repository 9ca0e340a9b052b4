"""The profiler: fits that find what steps were made of, and a profile of this device that the planner takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blendserve.engine import profiler
from blendserve.engine.profiler import fit, fit_steps, interference, main
from blendserve.engine.step_mixes import DECODE_MIXES, PREFILL_MIXES, SIDE_BY_SIDE_MIXES, MixLimits, StepMix
from blendserve.hardware_profile import SideBySide, load_profile
from blendserve.planner.performance_model import load_hardware, load_model_shape

ALL = [*PREFILL_MIXES, *DECODE_MIXES, *SIDE_BY_SIDE_MIXES]
MIXES = MixLimits(1024, 8192, 131_072, 400_000).fit(ALL)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.1, 10.0), min_size=6, max_size=6))
def test_a_fit_finds_the_costs_that_times_were_made_from(factors: list[float]) -> None:
    costs = np.array([5e-3, 2e-5, 2e-6, 1e-10, 3e-4, 3e-13]) * factors
    features = np.array([mix.features(131072) for mix in MIXES])
    np.testing.assert_allclose(fit(features, features @ costs), costs, rtol=1e-4)


@settings(max_examples=10, deadline=None)
@given(st.integers(8, 100))
def test_a_fit_finds_how_many_tokens_are_free(eighths: int) -> None:
    features = np.array([mix.features(131072) for mix in MIXES])
    taken = features.copy()
    taken[:, 1] = np.maximum(taken[:, 1] - 8 * eighths, 0)
    costs = np.array([7e-3, 2.2e-5, 1e-6, 1e-10, 3e-4, 3.3e-13])
    found, free_tokens = fit_steps(features, taken @ costs)
    features[:, 1] = np.maximum(features[:, 1] - free_tokens, 0)
    np.testing.assert_allclose(features @ found, taken @ costs, rtol=1e-3)


def test_no_cost_is_negative() -> None:
    features = np.array([mix.features(131072) for mix in MIXES])
    noise = np.random.default_rng(0).uniform(0.5, 1.5, len(MIXES))
    seconds = features @ np.array([5e-3, 2e-5, 0.0, 0.0, 0.0, 3e-13]) * noise
    found = fit(features, seconds)
    assert (found >= 0).all() and found[1] > 0 and found[5] > 0


def test_steps_fit_the_limits() -> None:
    small = MixLimits(max_num_seqs=64, max_num_batched_tokens=512, max_model_len=256, capacity_tokens=20_000).fit(ALL)
    assert all(mix.num_tokens <= 512 and mix.num_decodes <= 64 for mix in small)
    assert all(max(mix.context_tokens, mix.chunk_tokens) <= 256 for mix in small)
    assert all(mix.num_decodes * mix.context_tokens <= 20_000 for mix in small)
    assert {mix.chunk_tokens for mix in small} == {0, 128} and max(mix.num_decodes for mix in small) == 32
    assert StepMix(num_decodes=3, context_tokens=10).features(7) == [1.0, 3, 3, 0, 1.0, 210]


def test_interference_is_what_the_faster_way_leaves_of_the_shorter_work() -> None:
    mix = StepMix(256, 768, 2, 512)
    sides = SideBySide(num_kv_tokens=1, num_prefill_tokens=1, num_programs=28, gain=1.25)
    assert interference([(mix, sides)], lambda _: (6.0, 4.0)) == pytest.approx(0.5)  # 8 seconds instead of 10 or 6
    slower = sides.model_copy(update={"gain": 0.9})
    assert interference([(mix, slower)], lambda _: (6.0, 4.0)) == 1.0
    assert interference([], lambda _: (6.0, 4.0)) == 1.0


def test_a_profile_is_measured_and_planned_with(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = [
        StepMix(num_chunks=1, chunk_tokens=8),
        StepMix(num_chunks=4, chunk_tokens=32),
        StepMix(num_decodes=2, context_tokens=16),
        StepMix(num_decodes=16, context_tokens=64),
    ]
    monkeypatch.setattr(profiler, "PREFILL_MIXES", measured[:2])
    monkeypatch.setattr(profiler, "DECODE_MIXES", measured[2:])
    output = tmp_path / "profile.json"
    assert main([str(llama), "--output", str(output), "--load-format", "dummy", "--commit", "abc"]) == 0
    profile = load_profile(output)
    assert profile.commit == "abc" and profile.model.num_heads == 8 and profile.bytes_per_element in (2, 4)
    assert profile.gemm.seconds_per_unit > 0 and profile.decode_attention.seconds_per_unit > 0
    if profile.device.startswith("cpu"):
        monkeypatch.setattr("blendserve.planner.performance_model.visible_gpu", lambda: None)
    hardware = load_hardware(str(output), model=load_model_shape(llama))
    assert "measured" in hardware.name


def test_a_model_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing")]) != 0
    assert "nothing" in capsys.readouterr().err
