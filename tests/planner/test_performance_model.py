"""Shapes, hardware and constants: the sizes that the paper's formulas go wrong with when read literally."""

from __future__ import annotations

import json

import pytest

from blendserve import nvidia_smi
from blendserve.errors import ModelError, UsageError
from blendserve.planner.performance_model import (
    BUILT_IN_HARDWARE,
    BUILT_IN_MODELS,
    as_achieved,
    cost_constants,
    load_hardware,
    load_model_shape,
)
from blendserve.planner.simulate import simulated_machine
from tests.planner.jobs import CONFIG, write_model

LLAMA = BUILT_IN_MODELS["llama-3.1-8b"]


def test_kv_bytes_count_all_kv_heads():
    # "Feature dimension for each KV head" would be 128 and give an eighth of this, eight times the density.
    assert LLAMA.kv_bytes_per_token(2) == 2 * 2 * 8 * 128 * 32 == 131_072


def test_parameters_leave_out_embeddings_and_head():
    assert LLAMA.layer_parameters == pytest.approx(6.98e9, rel=1e-3)
    assert LLAMA.head_parameters == 4096 * 128256


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-2-7b", 6.74),
        ("llama-3.1-70b", 70.6),
        ("qwen2.5-7b", 7.62),
        ("qwen2.5-72b", 72.7),
        ("deepseek-67b", 67.4),
    ],
)
def test_built_in_shapes_add_up_to_the_published_sizes(name, billions):
    shape = BUILT_IN_MODELS[name]
    total = shape.layer_parameters + 2 * shape.head_parameters  # none of these ties embeddings and head
    assert total / 1e9 == pytest.approx(billions, rel=0.01)


def test_smollm2_ties_embeddings_and_head():
    shape = BUILT_IN_MODELS["smollm2-135m"]
    assert (shape.layer_parameters + shape.head_parameters) / 1e6 == pytest.approx(134.5, rel=0.01)


def test_constants_are_work_over_rate():
    constants = cost_constants(LLAMA, BUILT_IN_HARDWARE["a100-80gb"])
    assert constants.seconds_per_layer_token == pytest.approx(2 * 6.98e9 / 312e12, rel=1e-3)
    assert constants.seconds_per_kv_token == 131_072 / 2.039e12
    assert constants.seconds_per_attended_pair == 4 * 4096 * 32 / 312e12


def test_a_paper_workload_has_its_density():
    # OpenVid on an A100: outputs of mean 16,000 and coefficient of variation 1 have density 0.05.
    constants = cost_constants(LLAMA, BUILT_IN_HARDWARE["a100-80gb"])
    compute = 16_000 * (constants.seconds_per_layer_token + constants.seconds_per_sampled_token)
    memory = (40 * 16_000 + 16_000**2) * constants.seconds_per_kv_token  # E[d^2] / 2 is the mean squared
    assert compute / memory == pytest.approx(0.05, rel=0.1)


def test_a_config_gives_the_shape(tmp_path):
    shape = load_model_shape(write_model(tmp_path))
    assert (shape.num_kv_heads, shape.head_dim, shape.vocab_size) == (2, 16, 1000)


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({**CONFIG, "hidden_size": None}), "{}"])
def test_a_config_without_sizes_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"a size of the model|can.t be read|holds a JSON list"):
        load_model_shape(tmp_path)


@pytest.mark.parametrize("name", ["tpu", "0xh100", "4xtpu", "xh100"])
def test_unknown_hardware_is_refused(name):
    with pytest.raises(UsageError, match=r"Expected auto, a100-80gb"):
        load_hardware(name)


def test_auto_is_the_cpu_where_no_gpu_is(monkeypatch):
    monkeypatch.setattr(nvidia_smi.shutil, "which", lambda name: None)
    assert load_hardware("auto").name == "cpu"
    monkeypatch.setattr(nvidia_smi.shutil, "which", lambda name: "/bin/false")
    assert load_hardware("auto").name == "cpu"
    assert load_hardware("auto", device="cpu").name == "cpu"


@pytest.mark.parametrize(
    ("gpu", "name"),
    [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100-80gb")],
)
def test_auto_is_the_gpu_that_is_visible(monkeypatch, tmp_path, gpu, name):
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\necho '{gpu}'\n")
    command.chmod(0o755)
    monkeypatch.setattr(nvidia_smi.shutil, "which", lambda _: str(command))
    assert load_hardware("auto").name == name


def test_a_model_that_fills_the_memory_is_refused():
    with pytest.raises(UsageError, match="Take a smaller model or hardware with more memory"):
        simulated_machine(BUILT_IN_MODELS["llama-3.1-70b"], BUILT_IN_HARDWARE["a100-80gb"], is_overlapped=True)
    four = load_hardware("4xa100-80gb")
    assert four.bytes_per_second == 4 * 2.039e12
    assert simulated_machine(BUILT_IN_MODELS["llama-3.1-70b"], four, is_overlapped=True).capacity_tokens > 100_000


@pytest.mark.parametrize("name", ["h100", "4xh100", "a100-80gb", "cpu"])
def test_a_plan_takes_a_gpu_by_what_the_engine_gets_out_of_it(name):
    sheet = load_hardware(name)
    achieved = as_achieved(sheet, LLAMA)
    if name == "cpu":
        assert achieved == sheet
        return
    machine = simulated_machine(LLAMA, achieved, is_overlapped=False)
    peak = simulated_machine(LLAMA, sheet, is_overlapped=True)
    tokens, kv_tokens = 1000, 400_000
    compute = tokens * machine.constants.seconds_per_layer_token
    step = machine.step(compute, kv_tokens).seconds
    assert step == pytest.approx(0.0024 + compute + kv_tokens * machine.constants.seconds_per_kv_token)
    assert step > 1.3 * (compute * 0.65 + kv_tokens * peak.constants.seconds_per_kv_token)
    assert (sheet.basis, achieved.basis) == ("data_sheet", "achieved")
    assert as_achieved(achieved, LLAMA) == achieved
    assert (peak.interference, machine.interference) == (0.0, 1.0)
    assert simulated_machine(LLAMA, achieved, is_overlapped=True).interference == 1.0
    assert any("No profile of a100" in text for text in achieved.warnings) == (name == "a100-80gb")
