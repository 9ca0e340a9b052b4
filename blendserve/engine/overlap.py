"""When decodes and prefill chunks of a step run side by side, and how many SMs decode attention gets then.

Decode attention streams the KV cache and needs a third of the SMs for most of the bandwidth; products of prefill chunks
take the others. Both sides slow each other down, and the weights are read twice, so whether it pays depends on the GPU
and on the step. The profiler has tried it (`HardwareProfile.side_by_side`); steps like those that it made faster run
side by side, all others in one piece.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from blendserve.hardware_profile import SideBySide, stored_profile
from blendserve.models.config import ModelShape

_LEAST_GAIN = 1.02  # what two measurements of one step may differ by
_NEAR = 1.3  # a step is like a measured one where it has up to so many times its prefill tokens, or that part of them

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OverlapPolicy:
    """The measured steps that gained by running side by side, one at least."""

    paying: tuple[SideBySide, ...]

    @property
    def paced_tokens(self) -> int:
        """Prefill tokens that a step should have, so that it pays."""
        return max(self.paying, key=lambda step: step.gain).num_prefill_tokens

    def num_programs(self, num_decodes: int, num_kv_tokens: int, num_prefill_tokens: int) -> int:
        """SMs for decode attention, or 0 where the step runs in one piece."""
        alike = [step for step in self.paying if _is_like(step, num_kv_tokens, num_prefill_tokens)]
        return max(alike, key=lambda step: step.gain).num_programs if num_decodes and alike else 0


def _is_like(measured: SideBySide, num_kv_tokens: int, num_prefill_tokens: int) -> bool:
    prefill = measured.num_prefill_tokens
    return num_kv_tokens * _NEAR >= measured.num_kv_tokens and prefill / _NEAR <= num_prefill_tokens <= prefill * _NEAR


def overlap_policy(device_name: str, shape: ModelShape) -> OverlapPolicy | None:
    """What the stored profile of this GPU and model says; None where it says that nothing pays, or there is none."""
    profile = stored_profile(device_name, shape)
    if profile is None:
        log.warning(
            "overlap is on, but no profile says where it pays for this model on %s, so every step runs in one piece; "
            "measure one: python -m blendserve.engine.profiler MODEL_FOLDER",
            device_name,
        )
        return None
    paying = tuple(step for step in profile.side_by_side if step.gain >= _LEAST_GAIN)
    if not paying:
        log.info("overlap is on, but the profile of %s has no step that gains by it", device_name)
    return OverlapPolicy(paying) if paying else None
