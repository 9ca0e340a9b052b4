"""What a request costs: the shape of the model, the figures of the hardware, and the constants that follow.

The formulas themselves stand in `sql/blendserve_sql/request_costs.sql`; this page computes what is bound to them.
Source: paper, "Performance model", with H_kv = num_kv_heads * head_dim, the parameters of the layers without the
embeddings, the output head on sampled tokens only, and causal attention.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from blendserve.errors import ModelError, UsageError
from blendserve.hardware_profile import HardwareProfile, ProfiledModel, load_profile, stored_profile, stored_profiles
from blendserve.models.config import ModelShape
from blendserve.nvidia_smi import query_gpus


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device (or several that act as one): its rates and memory. `bytes_per_element` of weights and KV cache.

    basis: whether its figures are a data sheet's peaks, what the engine gets out of these, or those of its `profile`.
    interference: how much of the shorter of compute and memory time a step adds to the longer one, 1 without overlap.
    overhead_seconds: what a step takes beside its products and its reads, whatever it holds.
    profile: what was measured on it, which goes before the rates. `warnings` are for the plan.
    """

    name: str
    flops_per_second: float
    bytes_per_second: float
    memory_bytes: float
    bytes_per_element: int
    basis: Literal["data_sheet", "achieved", "measured"] = "data_sheet"
    interference: float = 1.0
    overhead_seconds: float = 0.0
    profile: HardwareProfile | None = None
    warnings: tuple[str, ...] = ()

    @property
    def is_cpu(self) -> bool:
        return self.name.endswith("cpu")

    def seconds(self, compute_seconds: float, memory_seconds: float) -> float:
        """How long compute and memory work take that run side by side as far as this device can."""
        shorter, longer = sorted((compute_seconds, memory_seconds))
        return longer + self.interference * shorter

    def times(self, num_devices: int) -> Hardware:
        """`num_devices` of these with the model split over all of them."""
        return replace(
            self,
            name=f"{num_devices}x{self.name}",
            flops_per_second=self.flops_per_second * num_devices,
            bytes_per_second=self.bytes_per_second * num_devices,
            memory_bytes=self.memory_bytes * num_devices,
        )


def step_floor_seconds(model: ModelShape, hardware: Hardware) -> float:
    """The least that a step's products take: all layers' weights are read once."""
    if hardware.profile is not None:
        return hardware.profile.gemm.floor_seconds
    return model.layer_parameters * hardware.bytes_per_element / hardware.bytes_per_second


def step_overhead_seconds(hardware: Hardware) -> float:
    """What a step takes beside its products and its reads, whatever it holds; 0 by the data sheet."""
    if hardware.profile is None:
        return hardware.overhead_seconds
    return max(hardware.profile.gemm.fixed_seconds - hardware.profile.gemm.floor_seconds, 0.0)


def tokens_within_a_step(model: ModelShape, hardware: Hardware) -> float:
    """How many tokens are multiplied in the time that reading the weights takes anyway."""
    return step_floor_seconds(model, hardware) / cost_constants(model, hardware).seconds_per_layer_token


@dataclass(frozen=True, slots=True)
class CostConstants:
    """Seconds per unit of work; the parameters of the relation `request_costs`."""

    seconds_per_layer_token: float  # one token through all layers' projections and MLPs
    seconds_per_sampled_token: float  # one token through the output head
    seconds_per_attended_pair: float  # one query against one key and value in all layers
    seconds_per_kv_token: float  # reading or writing one token of the KV cache
    prefix_readers: float = 1.0  # requests that read a shared prefix together; 1 where each reads it by itself


BUILT_IN_MODELS: Final = {
    "llama-2-7b": ModelShape(32, 4096, 32, 32, 128, 11008, 32000),
    "llama-3.1-8b": ModelShape(32, 4096, 32, 8, 128, 14336, 128256),
    "llama-3.1-70b": ModelShape(80, 8192, 64, 8, 128, 28672, 128256),
    "qwen2.5-7b": ModelShape(28, 3584, 28, 4, 128, 18944, 152064),
    "qwen2.5-72b": ModelShape(80, 8192, 64, 8, 128, 29568, 152064),
    "deepseek-67b": ModelShape(95, 8192, 64, 8, 128, 22016, 102400),
    "smollm2-135m": ModelShape(30, 576, 9, 3, 64, 1536, 49152),
}

# Data sheets: dense bf16 FLOP/s and HBM bandwidth. The CPU is two cores in float32, conservatively.
BUILT_IN_HARDWARE: Final = {
    "a100-80gb": Hardware("a100-80gb", 312e12, 2.039e12, 80e9, 2),
    "h100": Hardware("h100", 989.5e12, 3.35e12, 80e9, 2),
    "h200": Hardware("h200", 989.5e12, 4.8e12, 141e9, 2),
    "cpu": Hardware("cpu", 5e10, 1e10, 4e9, 4),
}

_ASSUMED_GPU: Final = "a100-80gb"  # for the figures of a GPU that isn't known

# What the engine gets out of an H100's data sheet, by the steps of real runs of an 8B model (benchmarks/throughput).
_ACHIEVED_FLOPS: Final = 0.69
_ACHIEVED_BANDWIDTH: Final = 0.905
_LAYER_OVERHEAD_SECONDS: Final = 75e-6


def cost_constants(model: ModelShape, hardware: Hardware) -> CostConstants:
    """The seconds that each unit of work takes, as measured or else at the hardware's peak rates."""
    if hardware.profile is not None:
        return _measured_constants(model, hardware, hardware.profile)
    attended_pair_flops = 4 * model.num_heads * model.head_dim * model.num_layers
    return CostConstants(
        seconds_per_layer_token=2 * model.layer_parameters / hardware.flops_per_second,
        seconds_per_sampled_token=2 * model.head_parameters / hardware.flops_per_second,
        seconds_per_attended_pair=attended_pair_flops / hardware.flops_per_second,
        seconds_per_kv_token=model.kv_bytes_per_token(hardware.bytes_per_element) / hardware.bytes_per_second,
    )


def _measured_constants(model: ModelShape, hardware: Hardware, profile: HardwareProfile) -> CostConstants:
    kv_bytes = model.kv_bytes_per_token(hardware.bytes_per_element)
    return CostConstants(
        seconds_per_layer_token=profile.gemm.seconds_per_unit,
        seconds_per_sampled_token=profile.head.seconds_per_unit,
        seconds_per_attended_pair=profile.prefill_attention.seconds_per_unit,
        seconds_per_kv_token=kv_bytes * profile.decode_attention.seconds_per_unit,
        prefix_readers=profile.prefix_readers if profile.decode_kernel == "shared_prefix" else 1.0,
    )


def load_model_shape(model: str | Path) -> ModelShape:
    """The shape of a built-in model name, or of the `config.json` in a model's folder.

    Raises ModelError when there is neither, or when the config lacks a size.
    """
    if str(model) in BUILT_IN_MODELS:
        return BUILT_IN_MODELS[str(model)]
    if not (Path(model) / "config.json").is_file():
        known = ", ".join(sorted(BUILT_IN_MODELS))
        raise ModelError(f"{model} has no config.json. Expected a model's folder or one of: {known}.")
    return ModelShape.load(Path(model))


def load_hardware(name: str, *, device: str = "auto", model: ModelShape | None = None) -> Hardware:
    """The hardware called `name`; `4xh100` is four that hold one model together; `*.json` is a measured profile.

    `auto` is the visible NVIDIA GPU, or the CPU where none is or `device` is cpu; a stored profile of that GPU and
    `model` goes before data-sheet figures. Raises UsageError on an unknown name and on a profile of another GPU than
    the visible one or of another model.
    """
    if name.endswith(".json"):
        return _profiled_hardware(load_profile(Path(name)), model)
    if name == "auto":
        return BUILT_IN_HARDWARE["cpu"] if device == "cpu" else _visible_hardware(model)
    matched = re.fullmatch(r"(?:([1-9]\d*)x)?(.+)", name)
    if matched is None or matched[2] not in BUILT_IN_HARDWARE:
        known = ", ".join(sorted(BUILT_IN_HARDWARE))
        raise UsageError(
            f"Unknown hardware '{name}'. Expected auto, {known}, several of one like 4xh100, or a profile's JSON file."
        )
    hardware = BUILT_IN_HARDWARE[matched[2]]
    return hardware.times(int(matched[1])) if matched[1] else hardware


def as_achieved(hardware: Hardware, model: ModelShape) -> Hardware:
    """`hardware` by what the engine gets out of a GPU instead of its peak rates; as it is where that was measured."""
    if hardware.basis != "data_sheet" or hardware.is_cpu:
        return hardware
    warnings = hardware.warnings
    if not hardware.name.endswith("h100"):
        warnings += (
            f"No profile of {hardware.name}: it is taken to reach the share of its peak rates that an H100 reaches. "
            "Measure a profile to be sure.",
        )
    return replace(
        hardware,
        flops_per_second=_ACHIEVED_FLOPS * hardware.flops_per_second,
        bytes_per_second=_ACHIEVED_BANDWIDTH * hardware.bytes_per_second,
        basis="achieved",
        overhead_seconds=_LAYER_OVERHEAD_SECONDS * model.num_layers,
        warnings=warnings,
    )


def _profiled_hardware(profile: HardwareProfile, model: ModelShape | None) -> Hardware:
    """The hardware that `profile` stands for. Raises UsageError where it was measured on something else."""
    visible = visible_gpu()
    if visible is not None and visible != profile.device:
        raise UsageError(
            f"The profile was measured on {profile.device}, the GPU here is {visible}. Measure this one, or plan with "
            "data-sheet figures."
        )
    if model is not None and profile.model != ProfiledModel.of(model):
        raise UsageError(
            f"The profile was measured with another model: {profile.model}, expected {model}. Measure this model."
        )
    base = BUILT_IN_HARDWARE[_built_in_name(profile.device) or _ASSUMED_GPU]
    return replace(
        base,
        name=f"{profile.device} (measured)",
        memory_bytes=profile.memory_bytes,
        bytes_per_element=profile.bytes_per_element,
        basis="measured",
        interference=profile.interference,
        profile=profile,
    )


def _visible_hardware(model: ModelShape | None) -> Hardware:
    """The first GPU that nvidia-smi names, by its profile or by its data sheet; the CPU where there is none."""
    gpu = visible_gpu()
    if gpu is None:
        return BUILT_IN_HARDWARE["cpu"]
    if model is not None and (profile := stored_profile(gpu, model)):
        return _profiled_hardware(profile, model)
    ignored = []
    for path, profile in stored_profiles():
        what = f"of another GPU or model ({profile.device})" if profile else "no valid profile"
        ignored.append(f"Profile {path.name} is {what}: not used.")
    name = _built_in_name(gpu)
    if name is None:
        ignored.append(
            f"The GPU here, {gpu}, is unknown: planned with the figures of {_ASSUMED_GPU}. Predicted seconds and the "
            "balance are guesses; measure a profile, or name the hardware that is most like it."
        )
    return replace(BUILT_IN_HARDWARE[name or _ASSUMED_GPU], warnings=tuple(ignored))


def _built_in_name(gpu: str) -> str | None:
    """The built-in hardware that the driver's name `gpu` means; None for any other GPU."""
    words = set(re.split(r"[^a-z0-9]+", gpu.lower()))
    if {"a100", "80gb"} <= words:
        return "a100-80gb"
    return next((name for name in ("h100", "h200") if name in words), None)


def visible_gpu() -> str | None:
    """The first GPU as nvidia-smi names it, or None."""
    names = query_gpus("name")
    return names[0] if names else None
