"""One attempt at a shard: its requests through the engine, its completions into its folder, and how far it is."""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import torch

import blendserve
from blendserve.engine.batch_density import BatchDensity
from blendserve.engine.detokenizer import Detokenizer
from blendserve.engine.device import describe_device, resolve_device
from blendserve.engine.request import Completion, FinishReason, Request
from blendserve.engine.shard_folder import CompletionWriter, ShardFolder
from blendserve.engine.shard_reader import ShardReader
from blendserve.engine.step_metrics import StepMetrics, ended_seconds
from blendserve.errors import ReconciliationError
from blendserve.manifest import PlanManifest, ShardManifest, ShardPlan

_PROGRESS_SECONDS = 1.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a shard is. `done`: requests, those of earlier attempts too; tokens: prompt and output, in the steps that
    count for the shard, 0 while they count for another.

    `density`: compute seconds over memory seconds of the requests that run, by the plan; None while none does.
    """

    shard: int
    done: int
    total: int
    num_running: int
    tokens_per_second: float
    seconds: float
    density: float | None


class ShardAttempt:
    """One attempt at a shard, whose folder is locked and taken over. It is through when it `is_complete`."""

    def __init__(
        self,
        plan_dir: Path,
        plan: PlanManifest,
        shard_plan: ShardPlan,
        folder: ShardFolder,
        *,
        on_progress: Callable[[Progress], None] | None,
        guests: Sequence[Request] = (),
    ) -> None:
        """guests: requests of earlier shards that will run on beside this one's."""
        self.shard = shard_plan.shard
        self._plan_id = plan.plan_id
        self._folder = folder
        self._on_progress = on_progress
        self.reader = ShardReader(
            plan_dir / shard_plan.file,
            seed=plan.sampling.seed,
            is_two_ended=plan.is_two_ended,
            done_rows=folder.read_counts().column("row_index").to_pylist(),
            guests=guests,
        )
        self._writer = CompletionWriter(folder)
        self._texts = Detokenizer(Path(plan.model), ()) if plan.engine.log_texts else None
        self._device = describe_device(resolve_device(plan.engine))
        self._num_requests = len(self.reader.row_indices)
        self._num_resumed = self._num_requests - self.reader.num_requests
        self._num_done = self._num_resumed
        self._num_tokens = self._num_steps = 0
        self._seconds = 0.0  # in steps
        self._has_steps = True  # whether steps count for this shard now
        self._density = BatchDensity(self.reader)
        self._reported_at = 0.0
        self._last_step: StepMetrics | None = None
        log.info(
            "Shard %d: %d requests, %d of them finished earlier, on %s",
            *(self.shard, self._num_requests, self._num_resumed, self._device),
        )

    @property
    def is_complete(self) -> bool:
        """Whether every request has its completion."""
        return self._num_done == self._num_requests

    @property
    def is_half_through(self) -> bool:
        """Whether at least half of what was left to run is finished."""
        return 2 * (self._num_done - self._num_resumed) >= self.reader.num_requests

    @property
    def is_lost(self) -> bool:
        """Whether another process was seen to have taken over."""
        return self._folder.is_lost

    @property
    def state(self) -> str:
        return f"Shard {self.shard} was asked to stop with {self._num_done} of {self._num_requests} requests finished."

    def add_step(self, metrics: StepMetrics) -> None:
        """Take in a step that counts for this shard."""
        self._has_steps = True
        metrics = replace(metrics, step=self._num_steps, started_seconds=self._seconds)
        self._num_steps += 1
        self._seconds += metrics.step_seconds
        self._num_tokens += metrics.num_prefill_tokens + metrics.num_cached_tokens + metrics.num_decode_tokens
        self._writer.add_step(metrics)
        self._last_step = metrics
        self._report()

    def yield_steps(self) -> None:
        """Steps count for another shard from now on."""
        self._has_steps = False
        self._reported_at = 0.0
        self._report()

    def add(self, completion: Completion) -> None:
        """Take in the completion of one of this shard's requests."""
        self._writer.add(completion)
        if self._texts is not None:
            _log_texts(completion, self._texts)
        self._num_done += 1
        self.reader.finish(completion)
        self._density.finish(completion.row_index)
        self._report()

    def write_due(self) -> None:
        """Write what shall not wait any longer; to be called after every step."""
        self._writer.write_due()

    def flush(self) -> None:
        """Write all that is finished."""
        self._writer.flush()

    def publish(self) -> ShardManifest:
        """Declare the shard done."""
        self.flush()
        manifest = self._manifest(self._folder.write_metrics())
        self._folder.publish(manifest)
        return manifest

    def _report(self) -> None:
        """Tell the progress, at most once a second and once at the end."""
        now, metrics = time.monotonic(), self._last_step
        is_early = now - self._reported_at < _PROGRESS_SECONDS and not self.is_complete
        if self._on_progress is None or metrics is None or is_early:
            return
        self._reported_at = now
        is_measured = self._has_steps and self._seconds > 0
        self._on_progress(
            Progress(
                shard=self.shard,
                done=self._num_done,
                total=self._num_requests,
                num_running=metrics.num_running,
                tokens_per_second=round(self._num_tokens / self._seconds, 1) if is_measured else 0.0,
                seconds=round(self._seconds, 3),
                density=self._density.value(),
            )
        )

    def _manifest(self, metrics: pa.Table) -> ShardManifest:
        counts = self._folder.read_counts()
        counts = counts.filter(pc.is_in(counts.column("row_index"), pa.array(self.reader.row_indices)))
        num_rows = pc.count_distinct(counts.column("row_index")).as_py()
        if counts.num_rows != self._num_requests or num_rows != self._num_requests:
            raise ReconciliationError(
                f"{self._folder.place} holds {counts.num_rows} completions of {num_rows} requests, expected one for "
                f"each of {self._num_requests}. Remove the folder and run the shard again."
            )

        def total(column: str, table: pa.Table = counts) -> int:
            return int(pc.sum(table.column(column)).as_py() or 0)

        num_failed = int(pc.sum(pc.equal(counts.column("finish_reason"), FinishReason.ERROR.value)).as_py() or 0)
        return ShardManifest(
            plan_id=self._plan_id,
            shard=self.shard,
            status="done",
            num_requests=self._num_requests,
            num_succeeded=self._num_requests - num_failed,
            num_failed=num_failed,
            num_resumed=self._num_resumed,
            num_prompt_tokens=total("num_prompt_tokens"),
            num_cached_tokens=total("num_cached_tokens"),
            num_completion_tokens=total("num_completion_tokens"),
            num_preemptions=total("num_preempted", metrics),
            num_steps=metrics.num_rows,
            seconds=ended_seconds(metrics),
            device=self._device,
            versions=_versions(),
        )


def _log_texts(completion: Completion, detokenizer: Detokenizer) -> None:
    prompt = [] if completion.prompt_token_ids is None else completion.prompt_token_ids.tolist()
    texts = {
        "request_id": completion.request_id,
        "prompt": detokenizer.decode(prompt),
        "completion": completion.text,
    }
    log.info("%s", json.dumps({"event": "completion", **texts}, ensure_ascii=False))


def _versions() -> dict[str, str]:
    return {
        "blendserve": blendserve.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyarrow": pa.__version__,
    }
