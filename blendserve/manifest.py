"""The small JSON files that say what was planned and what was done, and how files are written so that a crash at any
line leaves either the old file or the new one."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from blendserve.errors import PlanError
from blendserve.spec import EngineSpec, Policy, SamplingSpec


class FrozenManifest(BaseModel):
    """Base of the JSON files: no unknown keys, no changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ShardPlan(FrozenManifest):
    """One shard of a plan: a Parquet file of scheduled requests and what running it should take."""

    shard: int
    file: str  # relative to the plan's folder
    num_requests: int
    num_prompt_tokens: int
    estimated_output_tokens: int
    compute_seconds: float
    memory_seconds: float
    predicted_seconds: float


class StepCosts(FrozenManifest):
    """What the work of a step takes on the plan's hardware, in seconds: so that metrics say how well it was used.

    They are in every plan, in the units of the metrics. A shard file whose output lengths are learnt has the planner's
    own as well, for the requests' estimates, since its reader knows no plan and no model.
    """

    seconds_per_token: float  # through all layers' products
    seconds_per_sampled_token: float  # through the output head
    seconds_per_kv_byte: float  # of the KV cache, read


class PlanManifest(FrozenManifest):
    """`plan.json`: everything that `run-shard` needs besides the shard files themselves.

    `is_two_ended`: the shard files are sorted by falling density and are to be admitted from both ends at once
    (policy blend); otherwise they are admitted in file order.
    """

    plan_id: str
    policy: Policy
    is_two_ended: bool
    model: str  # a folder
    hardware: str
    sampling: SamplingSpec
    engine: EngineSpec
    step_costs: StepCosts | None = None  # not in plans of earlier versions
    completions: str  # folder that holds the completions of the shards, relative to the plan's folder
    shards: tuple[ShardPlan, ...]
    summary: dict[str, Any]


class ShardManifest(FrozenManifest):
    """`shard.json`, written last in a shard's completions folder: the shard is done."""

    plan_id: str
    shard: int
    status: Literal["done"]
    num_requests: int
    num_succeeded: int
    num_failed: int
    num_resumed: int  # finished by an earlier attempt
    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int
    num_preemptions: int
    num_steps: int
    seconds: float  # in steps, over all attempts
    device: str
    versions: dict[str, str]


ManifestT = TypeVar("ManifestT", bound=BaseModel)


def read_manifest(path: Path, kind: type[ManifestT]) -> ManifestT:
    """The manifest at `path`. Raises PlanError when it is missing, not JSON, or of another shape."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise PlanError(
            f"{path} is not there. Expected the {kind.__name__} of an earlier step; run that step first."
        ) from error
    except ValidationError as error:
        raise PlanError(
            f"{path} is no valid {kind.__name__}: {error}. It was written by another version or edited."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises PlanError when it holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
        found = type(content).__name__
    except ValueError as error:
        found = str(error)
    raise PlanError(
        f"{path} holds no JSON object: {found}. It was cut off or edited; remove it, with _SUCCESS where that is "
        "there, and run the job again."
    )


def write_manifest(path: Path, manifest: BaseModel | dict[str, Any]) -> None:
    """Write `manifest` as JSON, all of it or nothing."""
    content = manifest.model_dump(mode="json") if isinstance(manifest, BaseModel) else manifest
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed to `path`, on an error removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have the disk hold what was written to the file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
