"""A profile as the profiler would write it, for tests of whoever reads one."""

from __future__ import annotations

from blendserve.hardware_profile import AffineFit, HardwareProfile, ProfiledModel
from blendserve.planner.performance_model import BUILT_IN_MODELS

LLAMA = BUILT_IN_MODELS["llama-3.1-8b"]
H100 = "NVIDIA H100 80GB HBM3"


def make_profile(**changes: object) -> HardwareProfile:
    fields = {
        "device": H100,
        "memory_bytes": 80e9,
        "model": ProfiledModel.of(LLAMA),
        "bytes_per_element": 2,
        "gemm": AffineFit(fixed_seconds=2e-3, seconds_per_unit=2.2e-5),
        "head": AffineFit(fixed_seconds=0, seconds_per_unit=2e-6),
        "prefill_attention": AffineFit(fixed_seconds=0, seconds_per_unit=1.2e-9),
        "decode_attention": AffineFit(fixed_seconds=1e-4, seconds_per_unit=1 / 2.9e12),
        "interference": 0.8,
        "commit": "0" * 40,
        "measured_at": "2026-11-20T12:00:00Z",
    }
    return HardwareProfile(**{**fields, **changes})
