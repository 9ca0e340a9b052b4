"""Measured profiles: read and refused, used instead of data sheets, never for another GPU or model."""

from __future__ import annotations

import json

import pytest

from blendserve import hardware_profile
from blendserve.errors import UsageError
from blendserve.hardware_profile import AffineFit, load_profile, write_profile
from blendserve.planner import performance_model
from blendserve.planner.performance_model import BUILT_IN_MODELS, as_achieved, cost_constants, load_hardware
from blendserve.planner.simulate import simulated_machine
from tests.profiles import H100, LLAMA, make_profile


@pytest.fixture
def see_gpu(monkeypatch, tmp_path):
    """Make nvidia-smi name a GPU, and look for profiles in an empty folder, which is returned."""
    profiles = tmp_path / "profiles"
    profiles.mkdir()
    monkeypatch.setattr(hardware_profile, "PROFILES", profiles)

    def see(name: str | None):
        monkeypatch.setattr(performance_model, "visible_gpu", lambda: name)
        return profiles

    return see


def test_a_profile_is_read_as_it_was_written(tmp_path):
    write_profile(tmp_path / "p.json", make_profile())
    assert load_profile(tmp_path / "p.json") == make_profile()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "wrong: format"),
        ({"gemm": {"fixed_seconds": -1, "seconds_per_unit": 1e-5}}, "gemm.fixed_seconds"),
        ({"interference": 1.5}, "interference"),
        ({"memory": 1}, "memory"),
    ],
)
def test_a_broken_profile_is_refused(tmp_path, change, message):
    (tmp_path / "p.json").write_text(json.dumps({**make_profile().model_dump(), **change}))
    with pytest.raises(UsageError, match=message):
        load_profile(tmp_path / "p.json")
    with pytest.raises(UsageError, match="can't be read"):
        load_profile(tmp_path / "missing.json")


def test_measured_figures_go_before_the_data_sheet(tmp_path, see_gpu):
    see_gpu(None)
    write_profile(tmp_path / "p.json", make_profile())
    hardware = load_hardware(str(tmp_path / "p.json"), model=LLAMA)
    assert hardware.basis == "measured"
    assert as_achieved(hardware, LLAMA) == hardware
    constants = cost_constants(LLAMA, hardware)
    assert constants.seconds_per_layer_token == 2.2e-5
    assert constants.seconds_per_kv_token == pytest.approx(131_072 / 2.9e12)
    assert hardware.seconds(10.0, 5.0) == 10 + 0.8 * 5
    machine = simulated_machine(LLAMA, hardware, is_overlapped=True)
    assert (machine.step_seconds, machine.interference) == (2e-3, 0.8)
    assert simulated_machine(LLAMA, hardware, is_overlapped=False).interference == 1.0


def test_a_simulated_step_takes_what_the_profile_says_with_its_free_tokens():
    gemm = AffineFit(fixed_seconds=7e-3, seconds_per_unit=2e-5, free_units=200)
    hardware = performance_model._profiled_hardware(make_profile(gemm=gemm), LLAMA)
    machine = simulated_machine(LLAMA, hardware, is_overlapped=False)
    constants = machine.constants
    for tokens in (1, 200, 201, 5000):
        seconds = 7e-3 + 2e-5 * max(tokens - 200, 0) + 1000 * constants.seconds_per_kv_token
        assert machine.step(tokens * constants.seconds_per_layer_token, 1000).seconds == pytest.approx(seconds)
    decodes = [machine.step(250 * machine.decode_token_seconds, 1000 + 250 * step).seconds for step in range(7)]
    assert machine.decode_steps(7, 250, 1000).seconds == pytest.approx(sum(decodes))


def test_a_profile_is_found_for_the_gpu_that_is_visible(see_gpu):
    write_profile(see_gpu(H100) / "h100.json", make_profile())
    assert load_hardware("auto", model=LLAMA).profile == make_profile()
    assert load_hardware("h100", model=LLAMA).profile is None  # the data sheet, as asked for


def test_a_profile_of_another_gpu_or_model_is_refused_when_named_and_ignored_when_found(see_gpu):
    path = see_gpu("NVIDIA H200") / "h100.json"
    write_profile(path, make_profile())
    with pytest.raises(UsageError, match="measured on NVIDIA H100 80GB HBM3, the GPU here is NVIDIA H200"):
        load_hardware(str(path), model=LLAMA)
    hardware = load_hardware("auto", model=LLAMA)
    assert (hardware.name, hardware.profile) == ("h200", None)
    assert "another GPU or model" in hardware.warnings[0]
    see_gpu(H100)
    with pytest.raises(UsageError, match="measured with another model"):
        load_hardware(str(path), model=BUILT_IN_MODELS["qwen2.5-7b"])


def test_a_broken_profile_stops_no_job_that_does_not_name_it(see_gpu):
    profiles = see_gpu(H100)
    (profiles / "broken.json").write_text('{"format": 2}')
    hardware = load_hardware("auto", model=LLAMA)
    assert (hardware.name, hardware.warnings) == ("h100", ("Profile broken.json is no valid profile: not used.",))
    write_profile(profiles / "h100.json", make_profile())
    assert load_hardware("auto", model=LLAMA).profile == make_profile()


@pytest.mark.parametrize("gpu", ["NVIDIA A10", "NVIDIA GH200 480GB", "NVIDIA A100-SXM4-40GB", "NVIDIA H20"])
def test_an_unknown_gpu_is_not_silently_planned_as_another(see_gpu, gpu):
    see_gpu(gpu)
    hardware = load_hardware("auto", model=LLAMA)
    assert f"{gpu}, is unknown" in hardware.warnings[0]


def test_the_decode_kernel_decides_what_a_shared_prefix_costs(see_gpu, tmp_path):
    see_gpu(None)
    for kernel, readers in (("paged", 1.0), ("shared_prefix", 16.0)):
        write_profile(tmp_path / "p.json", make_profile(decode_kernel=kernel, prefix_readers=16.0))
        hardware = load_hardware(str(tmp_path / "p.json"), model=LLAMA)
        assert cost_constants(LLAMA, hardware).prefix_readers == readers


def test_the_bound_of_measured_figures_is_not_that_of_the_data_sheet(see_gpu, tmp_path):
    # A share of "optimal" means nothing without saying of which: these two differ by half.
    see_gpu(None)
    write_profile(tmp_path / "p.json", make_profile())
    measured = cost_constants(LLAMA, load_hardware(str(tmp_path / "p.json"), model=LLAMA))
    sheet = cost_constants(LLAMA, load_hardware("h100"))
    assert measured.seconds_per_layer_token > 1.5 * sheet.seconds_per_layer_token
    assert measured.seconds_per_kv_token > 1.1 * sheet.seconds_per_kv_token
