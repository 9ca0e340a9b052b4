"""A measured profile of one GPU running one model: what replaces data-sheet figures where it exists.

A profile is a JSON file that the engine's profiler writes and the planner reads; this page is all that both need of it
and imports neither torch nor DuckDB.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from blendserve.errors import UsageError
from blendserve.manifest import write_manifest
from blendserve.models.config import ModelShape

PROFILES: Final = Path("~/.cache/blendserve/profiles")  # where the profiler writes and the planner looks

DecodeKernel = Literal["paged", "shared_prefix"]


class _Profile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class AffineFit(_Profile):
    """`fixed_seconds + max(units - free_units, 0) * seconds_per_unit`, fitted to measurements of one step, all layers
    together.

    free_units: what takes no longer than none, as products of few tokens, for which the weights have to be read anyway.
    """

    fixed_seconds: float = Field(ge=0, allow_inf_nan=False)
    seconds_per_unit: float = Field(gt=0, allow_inf_nan=False)
    free_units: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    @property
    def floor_seconds(self) -> float:
        """The least that the work itself takes: that of the free units, or all that is fixed where none are free."""
        return self.free_units * self.seconds_per_unit or self.fixed_seconds


class ProfiledModel(_Profile):
    """The sizes that the measurements hold for; names as in `ModelShape`."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int

    @classmethod
    def of(cls, shape: ModelShape) -> ProfiledModel:
        return cls(**{name: getattr(shape, name) for name in cls.model_fields})


class SideBySide(_Profile):
    """A step whose decodes and prefill chunks were run side by side.

    num_programs: how many SMs decode attention had. gain: the time of the same step in one piece over its own.
    """

    num_kv_tokens: int = Field(gt=0)  # that its decodes read
    num_prefill_tokens: int = Field(gt=0)
    num_programs: int = Field(gt=0)
    gain: float = Field(gt=0, allow_inf_nan=False)


class HardwareProfile(_Profile):
    """What was measured, on what, by which code.

    gemm: a step's projections and MLPs of all layers over its tokens. head: the output head over sampled tokens.
    prefill_attention: over pairs of a query and a key, all layers. decode_attention: over bytes of KV cache read.
    interference: how much of the shorter of compute and memory work a step adds to the longer one when both run at one
    time, from 0 (free) to 1 (as long as one after the other; also where the engine doesn't overlap them).
    side_by_side: with which steps that was tried, each with the number of SMs that made it fastest.
    decode_kernel: whether decode attention reads a shared prefix once for all or once for each request.
    prefix_readers: with a shared-prefix kernel, how many requests read a shared prefix together on average.
    """

    format: Literal[1] = 1
    device: str = Field(min_length=1)  # as the driver names it, e.g. "NVIDIA H100 80GB HBM3"
    memory_bytes: float = Field(gt=0, allow_inf_nan=False)
    model: ProfiledModel
    bytes_per_element: int = Field(ge=1, le=8)
    gemm: AffineFit
    head: AffineFit
    prefill_attention: AffineFit
    decode_attention: AffineFit
    interference: float = Field(1.0, ge=0, le=1)
    side_by_side: tuple[SideBySide, ...] = ()
    decode_kernel: DecodeKernel = "paged"
    prefix_readers: float = Field(1.0, ge=1, allow_inf_nan=False)
    commit: str
    measured_at: str  # ISO 8601


def load_profile(path: Path) -> HardwareProfile:
    """The profile in the JSON file `path`. Raises UsageError when it can't be read or lacks something."""
    try:
        return HardwareProfile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"Profile {path} can't be read: {error}. Expected the JSON file of a measured GPU.") from error
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, problem["loc"])) or "file" for problem in error.errors())
        raise UsageError(
            f"Profile {path} is no valid profile of format 1; wrong: {fields}. Measure the GPU again."
        ) from error


def stored_profiles() -> Iterator[tuple[Path, HardwareProfile | None]]:
    """The files of the profiles that were measured here, with what they hold; None: it can't be read any more."""
    for path in sorted(PROFILES.expanduser().glob("*.json")):
        try:
            yield path, load_profile(path)
        except UsageError:
            yield path, None


def stored_profile(device: str, shape: ModelShape) -> HardwareProfile | None:
    """What was measured here on the GPU that the driver calls `device`, with a model of this shape."""
    model = ProfiledModel.of(shape)
    for _, profile in stored_profiles():
        if profile is not None and (profile.device, profile.model) == (device, model):
            return profile
    return None


def write_profile(path: Path, profile: HardwareProfile) -> None:
    """Write `profile` as JSON, all of it or nothing."""
    write_manifest(path, profile)
